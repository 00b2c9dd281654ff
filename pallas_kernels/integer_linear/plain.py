"""Products with integer weights in plain JAX: few rows read codes and scales alone; many make one layer or expert dense."""

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_swiglu import blocked
from pallas_kernels.integer_linear import reference
from pallas_kernels.integer_linear.cpu import ROWS

# (outputs at least, inputs that are summed at once): the fewer outputs, the more sums a GPU wants at a time. Writing them is at
# most 2% of what reading 4-bit codes is.
_PARTS = (4096, 2048), (1024, 1024), (0, 256)
_SLOTS = 16  # (token, choice), of which experts that are chosen twice are read twice


def integer_linear(x_TK, w):
    """See `api.integer_linear`."""
    if x_TK.shape[0] > ROWS:
        return reference.integer_linear(x_TK, w)
    y_TX = _few_rows(x_TK, w)
    return y_TX.reshape(x_TK.shape[0], *w.shape[len(w.inputs) :]).astype(x_TK.dtype)


def _few_rows(x_TK, w):
    """f32[T, N] as one sum of products, into which XLA fuses what makes numbers of codes: no dense weight is written.

    The axes of a weight: groups, bytes of a group, outputs.
    """
    T, K = x_TK.shape
    G, per_byte, mask = K // w.format.group, w.format.codes_per_byte, w.format.levels - 1
    codes = w.codes.reshape(G, w.format.group // per_byte, -1)
    part = next(part for outputs, part in _PARTS if codes.shape[2] >= outputs)
    parts = next(parts for parts in range(min(max(-(-K // part), 2), G), 0, -1) if G % parts == 0)
    scale = w.scale.reshape(G, 1, -1).astype(jnp.float32)
    zero = w.format.middle if w.zero is None else w.zero.reshape(G, 1, -1).astype(jnp.float32)
    x = x_TK.astype(jnp.float32).reshape(T, G, -1, per_byte, 1)

    def row(x):
        total = jnp.zeros((), jnp.float32)
        for place in range(per_byte):
            code = (codes >> (place * w.format.bits) & mask).astype(jnp.float32)
            total += x[:, :, place] * (code - zero)
        # in two steps, or XLA for GPUs takes them itself, and writes all products in between where outputs are few
        partial = (total * scale).reshape(parts, -1, *total.shape[1:]).sum((1, 2))
        return jax.lax.optimization_barrier(partial).sum(0)

    return jnp.stack([row(x[t]) for t in range(T)])


def integer_experts(x_TD, w_gate_up_ED2M, w_down_EMD, expert_TK, weight_TK):
    """See `api.integer_experts`."""
    (T, K), (E, _, D) = expert_TK.shape, w_down_EMD.shape
    if T * K > _SLOTS:
        return blocked.forward(x_TD, w_gate_up_ED2M, w_down_EMD, expert_TK, weight_TK)[0]
    expert_S = jnp.minimum(expert_TK.reshape(-1), E - 1)
    weight_S1 = jnp.where(expert_TK < E, weight_TK, 0).reshape(-1, 1)

    def products(x_SX, w):
        return jax.vmap(_few_rows)(x_SX[:, None], jax.tree.map(lambda a: a[expert_S], w))[:, 0]

    gate_SM, up_SM = jnp.split(products(jnp.repeat(x_TD, K, axis=0), w_gate_up_ED2M), 2, axis=-1)
    h_SM = (jax.nn.silu(gate_SM) * up_SM * weight_S1).astype(x_TD.dtype)
    return products(h_SM, w_down_EMD).reshape(T, K, D).sum(1).astype(x_TD.dtype)
