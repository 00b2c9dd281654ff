"""Linear layers with 8-bit operands on a mesh: each device runs the kernels on its part, and every sum stands here.

XLA cannot partition a kernel, and it partitions tiles badly. As in Megatron's tensor parallelism, a weight is split along its
outputs (the input is not split, its gradient a sum over devices) or along what is summed over (the result is a sum, handed out
along the sequence). Weights' gradients are summed over the batch's devices, each keeping the part that it stores.
"""

import functools
from typing import NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from dsv3_jax.model.layout import Layout
from dsv3_jax.parallel.collectives import all_gather, all_reduce, reduce_scatter
from pallas_kernels.scaled import Gemms, Scaled, bits, from_bits
from pallas_kernels.scaled_linear import products

Axes = tuple[str | None, ...]  # logical axes of a weight [K, ...]


class _Plan(NamedTuple):
    """Mesh axes and PartitionSpecs of a layer; `scatter` is the weight's axis whose parts devices keep of its gradient."""

    batch: tuple[str, ...]
    summed: tuple[str, ...]  # over which K is split
    outputs: tuple[str, ...]  # over which one of the weight's other axes is split
    w: P
    y: P
    dw: P
    scatter: int | None


def _plan(layout: Layout, axes: Axes, w_shape: tuple[int, ...]) -> _Plan:
    def split(name: str | None) -> tuple[str, ...]:
        return layout.axes(name) if name in ("heads", "ffn") else ()

    batch, splits = layout.axes("batch"), [split(name) for name in axes]
    summed, outputs = splits[0], next((s for s in splits[1:] if s), ())
    parts = layout.shards("batch")
    stored = next((i for i, name in enumerate(axes) if name in ("embed", "latent")), None)
    scatter = stored if batch and stored is not None and w_shape[stored] % parts == 0 else None
    dw = [split or (batch if i == scatter else ()) for i, split in enumerate(splits)]
    y = layout.spec("batch", "sequence", None) if summed else P(batch or None, None, *(s or None for s in splits[1:]))
    return _Plan(batch, summed, outputs, P(*(s or None for s in splits)), y, P(*(s or None for s in dw)), scatter)


def _operand_specs(plan: _Plan, gated: bool) -> tuple[P, Scaled]:
    """Specs of x, [B, L, K] or [B, L, 2, K], and of what is kept of it: values [B, L, k or 2k], scales [k_tiles, B, L]."""
    batch, summed = plan.batch or None, plan.summed or None
    x = P(batch, None, None, summed) if gated else P(batch, None, summed)
    return x, Scaled(P(batch, None, summed), P(summed, batch, None))  # type: ignore[arg-type]


def _flat(w):
    return w.reshape(w.shape[0], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def scaled(layout: Layout, gemms: Gemms, axes: Axes, x, w_KX):
    """See `model.layout.Layout.scaled_linear`; x [B, L, 2, K] is a gate and what passes it."""
    return _forward(layout, gemms, axes, x, w_KX)[0]


def _forward(layout: Layout, gemms: Gemms, axes: Axes, x, w_KX):
    gated, plan = x.ndim == 4, _plan(layout, axes, w_KX.shape)
    product = products.swiglu_forward if gated else products.forward

    def local(x, w_kx):
        b, L = x.shape[:2]
        y_Tx, kept = product(x.reshape(b * L, -1), _flat(w_kx), gemms)
        y = y_Tx.reshape(b, L, *w_kx.shape[1:])
        y = reduce_scatter(y, plan.summed, 1)
        kept = bits(kept)
        return y, Scaled(kept.values.reshape(b, L, -1), kept.scales.reshape(-1, b, L))

    of_x, of_kept = _operand_specs(plan, gated)
    y, kept = layout.on_each_device(local, (of_x, plan.w), (plan.y, of_kept))(x, w_KX)
    return y, (checkpoint_name(kept, products.RESIDUALS) if gated else kept, w_KX)


def _backward(layout: Layout, gemms: Gemms, axes: Axes, residuals, dy):
    kept, w_KX = residuals
    gated, plan = kept.values.shape[-1] != w_KX.shape[0], _plan(layout, axes, w_KX.shape)
    product = products.swiglu_backward if gated else products.backward

    def local(kept, w_kx, dy):
        dy = all_gather(dy, plan.summed, 1)
        b, L, _ = kept.values.shape
        T = b * L
        flat = Scaled(kept.values.reshape(T, -1), kept.scales.reshape(-1, T))
        dx, dw = product(from_bits(flat, gemms.forward), _flat(w_kx), dy.reshape(T, -1), gemms)
        dx = dx.reshape(b, L, *[2] * gated, -1)
        dx = all_reduce(dx, plan.outputs)
        dw = dw.reshape(w_kx.shape)
        dw = all_reduce(dw, plan.batch) if plan.scatter is None else reduce_scatter(dw, plan.batch, plan.scatter)
        return dx, dw.astype(w_kx.dtype)

    of_x, of_kept = _operand_specs(plan, gated)
    return layout.on_each_device(local, (of_kept, plan.w, plan.y), (of_x, plan.dw))(kept, w_KX, dy)


scaled.defvjp(_forward, _backward)
