"""RMSNorm with quantisation for NVIDIA Hopper (Mosaic GPU): one warpgroup for 64 rows, tile by tile.

64 rows of the released model's 7168 numbers do not fit shared memory, so the input is read twice: once for the rows'
mean squares, once to scale and quantise.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import BLOCK, ROWS, load, over_columns, pad_rows
from pallas_kernels.quantize.reference import encode, scale_of
from pallas_kernels.scaled import DTYPES, TILE, Format, Scaled


def _zeros() -> jax.Array:
    return plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), plgpu.Layout.WGMMA.reduce(1))


def _over_rows(x_smem) -> jax.Array:
    """One number a column."""
    return lax.broadcast_in_dim(plgpu.load(x_smem, layout=plgpu.Layout.WGMMA.reduce(0)), BLOCK, (1,))


def rms_norm_quantize(x_TD: jax.Array, scale_D, eps: float, format: Format, power_of_two: bool, interpret: Any = None):
    """See `api.rms_norm_quantize`."""
    T, D = x_TD.shape
    x_TD = pad_rows(x_TD)
    padded = x_TD.shape[0]

    def body(
        x_gmem, weight_gmem, values_gmem, scales_gmem, inverse_gmem, x_smem, weight_smem, values_smem, row_smem, x_barrier, both
    ):
        rows = pl.ds(lax.axis_index("rows") * ROWS, ROWS)

        def squares(tile, total):
            plgpu.copy_gmem_to_smem(x_gmem.at[rows, pl.ds(tile * TILE, TILE)], x_smem, x_barrier)
            plgpu.barrier_wait(x_barrier)
            x = load(x_smem)
            return total + jnp.sum(x * x, axis=1)

        inverse = lax.rsqrt(lax.fori_loop(0, D // TILE, squares, _zeros()) / D + eps)
        row_smem[0] = inverse
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(row_smem, inverse_gmem.at[pl.ds(0, 1), rows])
        plgpu.wait_smem_to_gmem(0)

        @pl.loop(0, D // TILE)
        def _(tile):
            at = pl.ds(tile * TILE, TILE)
            plgpu.copy_gmem_to_smem(x_gmem.at[rows, at], x_smem, both)
            plgpu.copy_gmem_to_smem(weight_gmem.at[at], weight_smem, both)
            plgpu.barrier_wait(both)
            y = load(x_smem) * over_columns(inverse) * _over_rows(weight_smem)
            scale = scale_of(jnp.max(jnp.abs(y), axis=1), format, power_of_two)
            values_smem[...] = encode(y, over_columns(1 / scale), format)
            row_smem[0] = scale
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(values_smem, values_gmem.at[rows, at])
            plgpu.copy_smem_to_gmem(row_smem, scales_gmem.at[pl.ds(tile, 1), rows])
            plgpu.wait_smem_to_gmem(0)

    values, scales, inverse = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((padded, D), DTYPES[format]), jax.ShapeDtypeStruct((D // TILE, padded), jnp.float32),
            jax.ShapeDtypeStruct((1, padded), jnp.float32),
        ),
        scratch_types=(
            plgpu.SMEM(BLOCK, x_TD.dtype), plgpu.SMEM((TILE,), jnp.float32), plgpu.SMEM(BLOCK, DTYPES[format]),
            plgpu.SMEM((1, ROWS), jnp.float32), plgpu.Barrier(), plgpu.Barrier(num_arrivals=2),
        ),
        grid=(padded // ROWS,), grid_names=("rows",), interpret=interpret,
    )(x_TD, scale_D)  # fmt: skip
    return Scaled(values[:T], scales[:, :T]), inverse[0, :T]


def rms_norm_backward(x_TD: jax.Array, scale_D, inverse_T, dy_TD: jax.Array, interpret: Any = None):
    """See `api.rms_norm_backward`. Each block's part of dscale is written; their sum is XLA's."""
    T, D = x_TD.shape
    x_TD, dy_TD = pad_rows(x_TD), pad_rows(dy_TD)
    padded = x_TD.shape[0]
    inverse_T = jnp.pad(inverse_T, (0, padded - T))

    def body(
        x_gmem, weight_gmem, inverse_gmem, dy_gmem, dx_gmem, dscale_gmem,
        x_smem, weight_smem, row_smem, dy_smem, dx_smem, dscale_smem, barrier, row_barrier,
    ):  # fmt: skip
        i = lax.axis_index("rows")
        rows = pl.ds(i * ROWS, ROWS)
        plgpu.copy_gmem_to_smem(inverse_gmem.at[rows], row_smem, row_barrier)
        plgpu.barrier_wait(row_barrier)
        inverse = plgpu.load(row_smem, layout=plgpu.Layout.WGMMA.reduce(1))

        def fetch(tile):
            at = pl.ds(tile * TILE, TILE)
            plgpu.copy_gmem_to_smem(x_gmem.at[rows, at], x_smem, barrier)
            plgpu.copy_gmem_to_smem(dy_gmem.at[rows, at], dy_smem, barrier)
            plgpu.copy_gmem_to_smem(weight_gmem.at[at], weight_smem, barrier)
            plgpu.barrier_wait(barrier)
            return load(x_smem) * over_columns(inverse), load(dy_smem), _over_rows(weight_smem)

        def project(tile, total):
            normed, dy, weight = fetch(tile)
            return total + jnp.sum(dy * weight * normed, axis=1)

        along = lax.fori_loop(0, D // TILE, project, _zeros()) / D

        @pl.loop(0, D // TILE)
        def _(tile):
            normed, dy, weight = fetch(tile)
            dx_smem[...] = ((dy * weight - normed * over_columns(along)) * over_columns(inverse)).astype(dx_smem.dtype)
            dscale_smem[0] = jnp.sum(dy * normed, axis=0)
            plgpu.commit_smem()
            at = pl.ds(tile * TILE, TILE)
            plgpu.copy_smem_to_gmem(dx_smem, dx_gmem.at[rows, at])
            plgpu.copy_smem_to_gmem(dscale_smem, dscale_gmem.at[pl.ds(i, 1), at])
            plgpu.wait_smem_to_gmem(0)

    dx, dscale = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((padded, D), x_TD.dtype), jax.ShapeDtypeStruct((padded // ROWS, D), jnp.float32),
        ),
        scratch_types=(
            plgpu.SMEM(BLOCK, x_TD.dtype), plgpu.SMEM((TILE,), jnp.float32), plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.SMEM(BLOCK, dy_TD.dtype), plgpu.SMEM(BLOCK, x_TD.dtype), plgpu.SMEM((1, TILE), jnp.float32),
            plgpu.Barrier(num_arrivals=3), plgpu.Barrier(),
        ),
        grid=(padded // ROWS,), grid_names=("rows",), interpret=interpret,
    )(x_TD, scale_D, inverse_T, dy_TD)  # fmt: skip
    return dx[:T], jnp.sum(dscale, axis=0)
