"""Linear layers with 8-bit operands on a mesh: each device runs the kernels on its part, and every sum stands here.

XLA cannot partition a kernel, and it partitions tiles badly. As in Megatron's tensor parallelism, a weight is split along its
outputs (the input is whole, its gradient a sum over devices) or along what is summed over (the result is a sum, handed out
along the sequence). Weights' gradients are summed over the batch's devices, each keeping the part that it stores.
"""

import functools
import math
from typing import NamedTuple

import jax
from jax import lax
from jax.sharding import PartitionSpec as P

from pallas_kernels import scaled_linear
from pallas_kernels.scaled import Gemms, Scaled

Axes = tuple[str | None, ...]  # logical axes of a weight [K, ...]


class _Plan(NamedTuple):
    """Mesh axes and PartitionSpecs of a layer; `scatter` is the weight's axis whose parts devices keep of its gradient."""

    batch: tuple[str, ...]
    summed: tuple[str, ...]  # over which K is split
    outputs: tuple[str, ...]  # over which one of the weight's other axes is split
    x: P
    w: P
    y: P
    dw: P
    scatter: int | None


def _plan(layout, axes: Axes, w_shape: tuple[int, ...]) -> _Plan:
    def place(name: str | None) -> tuple[str, ...]:
        return layout.axes(name) if name in ("heads", "ffn") else ()

    batch, places = layout.axes("batch"), [place(name) for name in axes]
    summed, outputs = places[0], next((p for p in places[1:] if p), ())
    parts = math.prod(layout.mesh.shape[a] for a in batch)
    stored = next((i for i, name in enumerate(axes) if name in ("embed", "latent")), None)
    scatter = stored if batch and stored is not None and w_shape[stored] % parts == 0 else None
    dw = [place or (batch if i == scatter else ()) for i, place in enumerate(places)]
    y = layout.spec("batch", "sequence", None) if summed else P(batch or None, None, *(p or None for p in places[1:]))
    x = P(batch or None, None, summed or None)
    return _Plan(batch, summed, outputs, x, P(*(p or None for p in places)), y, P(*(p or None for p in dw)), scatter)


def _flat(w):
    return w.reshape(w.shape[0], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def scaled(layout, gemms: Gemms, axes: Axes, x_BLK, w_KX):
    """See `model.layout.Layout.scaled_linear`; `layout` is a `MeshLayout`."""
    return _forward(layout, gemms, axes, x_BLK, w_KX)[0]


def _forward(layout, gemms: Gemms, axes: Axes, x_BLK, w_KX):
    plan = _plan(layout, axes, w_KX.shape)

    def local(x_bLk, w_kx):
        b, L, k = x_bLk.shape
        y_Tx, x = scaled_linear.forward(x_bLk.reshape(b * L, k), _flat(w_kx), gemms)
        y = y_Tx.reshape(b, L, *w_kx.shape[1:])
        y = lax.psum_scatter(y, plan.summed, scatter_dimension=1, tiled=True) if plan.summed else y
        return y, Scaled(x.values.reshape(b, L, k), x.scales.reshape(-1, b, L))

    kept = Scaled(plan.x, P(plan.summed or None, plan.batch or None, None))  # type: ignore[arg-type]
    y, x = layout.on_each_device(local, (plan.x, plan.w), (plan.y, kept))(x_BLK, w_KX)
    return y, (x, w_KX)


def _backward(layout, gemms: Gemms, axes: Axes, residuals, dy):
    x, w_KX = residuals
    plan = _plan(layout, axes, w_KX.shape)

    def local(x, w_kx, dy):
        dy = lax.all_gather(dy, plan.summed, axis=1, tiled=True) if plan.summed else dy
        b, L, k = x.values.shape
        x = Scaled(x.values.reshape(b * L, k), x.scales.reshape(-1, b * L))
        dx_Tk, dw = scaled_linear.backward(x, _flat(w_kx), dy.reshape(b * L, -1), gemms)
        dx = dx_Tk.reshape(b, L, k)
        dx = lax.psum(dx, plan.outputs) if plan.outputs else dx
        dw = dw.reshape(w_kx.shape)
        if plan.scatter is not None:
            dw = lax.psum_scatter(dw, plan.batch, scatter_dimension=plan.scatter, tiled=True)
        elif plan.batch:
            dw = lax.psum(dw, plan.batch)
        return dx, dw.astype(w_kx.dtype)

    kept = Scaled(plan.x, P(plan.summed or None, plan.batch or None, None))  # type: ignore[arg-type]
    return layout.on_each_device(local, (kept, plan.w, plan.y), (plan.x, plan.dw))(x, w_KX, dy)


scaled.defvjp(_forward, _backward)
