"""Grouped SwiGLU for TPU on JAX's megablox kernels: products of rows that are sorted by expert, as many as there are."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox import gmm

from pallas_kernels.products import as_precise_as_operands

_TILES = (512, 1024, 1024)  # rows, contraction, columns at most: 10 MB with the two copies of each that a core holds


def _tiling(rows: int, contraction: int, columns: int) -> tuple[int, int, int]:
    """Whole tiles of 128 and no more than the sides need; they may end beyond the contraction and columns, not the rows."""
    rows, contraction, columns = (
        min(tile, -(-side // 128) * 128) for tile, side in zip(_TILES, (rows, contraction, columns), strict=True)
    )
    return rows, contraction, columns


def _product(x_PX, w_EXY, count_E, exists_P1, interpret: bool):
    """Rows times their experts' matrices; zeros, and zero gradients, where there is no row: the kernels leave these as memory
    has them."""
    x_PX = jnp.where(exists_P1, x_PX, 0)
    tiling = _tiling(x_PX.shape[0], *w_EXY.shape[1:])

    def product(x_PX, w_EXY, count_E):
        return gmm(x_PX, w_EXY, count_E, x_PX.dtype, tiling, interpret=interpret)

    y_PY = as_precise_as_operands(product, x_PX, w_EXY)(x_PX, w_EXY, count_E)
    return jnp.where(exists_P1, y_PY, 0)


@functools.partial(jax.named_call, name="grouped_swiglu_megablox")
def grouped_swiglu(x_TD, w_gate_up_ED2M, w_down_EMD, expert_TK, weight_TK, interpret: bool = False):
    """See `api.grouped_swiglu`. P slots t*K + k, sorted by expert; those without one come last, beyond all groups, and so do
    some that fill up the last tile."""
    T, K = expert_TK.shape
    E, D, _, M = w_gate_up_ED2M.shape
    tile = _tiling(T * K, D, M)[0]
    expert_P = jnp.pad(expert_TK.reshape(-1), (0, -(T * K) % tile), constant_values=E)
    order_P = jnp.argsort(expert_P, stable=True)
    count_E = jnp.bincount(expert_P, length=E).astype(jnp.int32)
    exists_P1 = (jnp.arange(expert_P.size) < count_E.sum())[:, None]
    token_P = jnp.minimum(order_P // K, T - 1)
    gate_up_PX = _product(x_TD[token_P], w_gate_up_ED2M.reshape(E, D, 2 * M), count_E, exists_P1, interpret)
    gate_PM, up_PM = jnp.split(gate_up_PX.astype(jnp.float32), 2, axis=-1)
    weight_P1 = weight_TK.reshape(-1).at[order_P].get(mode="fill", fill_value=0)[:, None]
    h_PM = (jax.nn.silu(gate_PM) * up_PM * weight_P1).astype(x_TD.dtype)
    y_PD = _product(h_PM, w_down_EMD, count_E, exists_P1, interpret)
    if K == 1:
        return jnp.zeros_like(x_TD).at[order_P].set(y_PD, mode="drop", unique_indices=True)
    return jnp.zeros_like(x_TD).at[token_P].add(y_PD)
