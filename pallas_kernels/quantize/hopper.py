"""Quantisation for NVIDIA Hopper (Mosaic GPU): one warpgroup for each 128 x 128 numbers."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import cost
from pallas_kernels.quantize.reference import encode, scale_of
from pallas_kernels.scaled import DTYPES, TILE, Format, Scaled, pad_to_tiles

_SQUARE = (TILE, TILE)


def _store(numbers, amax, format: Format, power_of_two: bool, out, scratch) -> None:
    """Write 128 x 128 numbers with one scale a row to global memory."""
    (values_gmem, scales_gmem), (values_smem, scales_smem) = out, scratch
    scale = scale_of(amax, format, power_of_two)
    values_smem[...] = encode(numbers, lax.broadcast_in_dim(1 / scale, _SQUARE, (0,)), format)
    scales_smem[0] = scale
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(values_smem, values_gmem)
    plgpu.copy_smem_to_gmem(scales_smem, scales_gmem)
    plgpu.wait_smem_to_gmem(0)


def _call(body, inputs: tuple, smem: tuple, shape: tuple[int, ...], format: Format, interpret: Any):
    """One program for each square of the [M, K] result; `smem` holds what it reads of the inputs."""
    M, K = shape
    out = jax.ShapeDtypeStruct(shape, DTYPES[format]), jax.ShapeDtypeStruct((K // TILE, M), jnp.float32)
    return plgpu.kernel(
        body,
        out_type=out,
        cost_estimate=cost.quantize([*inputs], [*out], dequantizes=len(inputs) > 1),
        scratch_types=(
            *smem, plgpu.SMEM(_SQUARE, DTYPES[format]), plgpu.SMEM((1, TILE), jnp.float32),
            plgpu.Barrier(num_arrivals=len(inputs)),
        ),
        grid=(M // TILE, K // TILE), grid_names=("rows", "columns"), interpret=interpret,
    )(*inputs)  # fmt: skip


def _square() -> tuple:
    """This program's square of 128 x 128: slices of its rows and columns, and the numbers of their tiles."""
    i, k = lax.axis_index("rows"), lax.axis_index("columns")
    return pl.ds(i * TILE, TILE), pl.ds(k * TILE, TILE), i, k


def quantize(x: jax.Array, rows: int, format: Format, power_of_two: bool, interpret: Any = None) -> Scaled:
    """See `api.quantize`."""
    M, K = x.shape
    x = pad_to_tiles(x, TILE)

    def body(x_gmem, values_gmem, scales_gmem, x_smem, values_smem, scales_smem, barrier):
        at_row, at_column, _, k = _square()
        plgpu.copy_gmem_to_smem(x_gmem.at[at_row, at_column], x_smem, barrier)
        plgpu.barrier_wait(barrier)
        numbers = plgpu.load(x_smem, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
        amax = jnp.max(jnp.abs(numbers), axis=1)
        if rows > 1:
            amax = lax.broadcast_in_dim(jnp.max(amax), (TILE,), ())
            amax = plgpu.layout_cast(amax, plgpu.Layout.WGMMA.reduce(1))
        out = values_gmem.at[at_row, at_column], scales_gmem.at[pl.ds(k, 1), at_row]
        _store(numbers, amax, format, power_of_two, out, (values_smem, scales_smem))

    values, scales = _call(body, (x,), (plgpu.SMEM(_SQUARE, x.dtype),), x.shape, format, interpret)
    return Scaled(values[:M, :K], scales[:, :M:rows])


def quantize_transposed(x: jax.Array | Scaled, format: Format, power_of_two: bool, interpret: Any = None) -> Scaled:
    """See `api.quantize_transposed`. Shared memory is read across its rows, which costs bank conflicts but no other memory.

    That works for numbers of 16 bits: those of 8 are widened, which is exact, and those of 32 are transposed before.
    """
    if not isinstance(x, Scaled):
        return _transposed(x, None, format, power_of_two, interpret) if x.dtype.itemsize == 2 else quantize(
            x.T, 1, format, power_of_two, interpret
        )  # fmt: skip
    return _transposed(x.values, x.row_scales(), format, power_of_two, interpret)


def _transposed(x: jax.Array, scales: jax.Array | None, format: Format, power_of_two: bool, interpret: Any) -> Scaled:
    M, K = x.shape
    x = pad_to_tiles(x, TILE)
    inputs, smem = (x,), (plgpu.SMEM(_SQUARE, x.dtype),)
    if scales is not None:
        inputs += (jnp.pad(scales, ((0, 0), (0, x.shape[0] - M))),)
        smem += (plgpu.SMEM((TILE,), jnp.float32), plgpu.SMEM(_SQUARE, jnp.float16))

    def body(*refs):
        x_gmem, *scales_gmem = refs[: len(inputs)]
        values_gmem, out_scales_gmem, x_smem, *more_smem, values_smem, out_scales_smem, barrier = refs[len(inputs) :]
        at_row, at_column, i, k = _square()  # of the result: column and row of x
        plgpu.copy_gmem_to_smem(x_gmem.at[at_column, at_row], x_smem, barrier)
        if scales_gmem:
            plgpu.copy_gmem_to_smem(scales_gmem[0].at[i, at_column], more_smem[0], barrier)
        plgpu.barrier_wait(barrier)
        if scales_gmem:
            scales_smem, wide_smem = more_smem
            wide_smem[...] = plgpu.load(x_smem, layout=plgpu.Layout.WGMMA).astype(jnp.float16)
            plgpu.commit_smem()
            x_smem = wide_smem
        across = plgpu.load(x_smem.transpose((1, 0)), layout=plgpu.Layout.WGMMA, optimized=False)
        numbers = across.astype(jnp.float32)
        if scales_gmem:
            scale = plgpu.load(scales_smem, layout=plgpu.Layout.WGMMA.reduce(0))
            numbers *= lax.broadcast_in_dim(scale, _SQUARE, (1,))
        out = values_gmem.at[at_row, at_column], out_scales_gmem.at[pl.ds(k, 1), at_row]
        _store(numbers, jnp.max(jnp.abs(numbers), axis=1), format, power_of_two, out, (values_smem, out_scales_smem))

    values, tile_scales = _call(body, inputs, smem, x.shape[::-1], format, interpret)
    return Scaled(values[:K, :M], tile_scales[:, :K])
