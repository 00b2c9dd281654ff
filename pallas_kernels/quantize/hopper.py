"""Quantisation for NVIDIA Hopper (Mosaic GPU): one warpgroup for each 128 x 128 numbers."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.quantize.reference import encode, scale_of
from pallas_kernels.scaled import DTYPES, TILE, Format, Scaled


def quantize(x: jax.Array, rows: int, format: Format, power_of_two: bool, interpret: Any = None) -> Scaled:
    """See `api.quantize`."""
    M, K = x.shape
    x = jnp.pad(x, ((0, -M % TILE), (0, -K % TILE))) if M % TILE or K % TILE else x
    square = (TILE, TILE)

    def body(x_gmem, values_gmem, scales_gmem, x_smem, values_smem, scales_smem, barrier):
        i, k = lax.axis_index("rows"), lax.axis_index("columns")
        at = pl.ds(i * TILE, TILE), pl.ds(k * TILE, TILE)
        plgpu.copy_gmem_to_smem(x_gmem.at[at], x_smem, barrier)
        plgpu.barrier_wait(barrier)
        numbers = plgpu.load(x_smem, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
        amax = jnp.max(jnp.abs(numbers), axis=1)
        if rows > 1:
            amax = lax.broadcast_in_dim(jnp.max(amax), (TILE,), ())
            amax = plgpu.layout_cast(amax, plgpu.Layout.WGMMA.reduce(1))
        scale = scale_of(amax, format, power_of_two)
        values_smem[...] = encode(numbers, lax.broadcast_in_dim(1 / scale, square, (0,)), format)
        scales_smem[0] = scale
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(values_smem, values_gmem.at[at])
        plgpu.copy_smem_to_gmem(scales_smem, scales_gmem.at[pl.ds(k, 1), pl.ds(i * TILE, TILE)])
        plgpu.wait_smem_to_gmem(0)

    values, scales = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct(x.shape, DTYPES[format]),
            jax.ShapeDtypeStruct((x.shape[1] // TILE, x.shape[0]), jnp.float32),
        ),
        scratch_types=(
            plgpu.SMEM(square, x.dtype), plgpu.SMEM(square, DTYPES[format]), plgpu.SMEM((1, TILE), jnp.float32),
            plgpu.Barrier(),
        ),
        grid=(x.shape[0] // TILE, x.shape[1] // TILE), grid_names=("rows", "columns"),
        interpret=interpret,
    )(x)  # fmt: skip
    return Scaled(values[:M, :K], scales[:, :M:rows])
