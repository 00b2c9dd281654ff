"""Shared parts of the kernels for NVIDIA Hopper (Mosaic GPU): a warpgroup works on 64 rows, mostly of a tile of 128 numbers."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.scaled import TILE

ROWS = 64  # rows of a program: four float32 tiles of 128 rows would not fit a warpgroup's registers
BLOCK = (ROWS, TILE)
ROW = plgpu.Layout.WGMMA.reduce(1)  # layout of registers with one number for each row of a block
COLUMN = plgpu.Layout.WGMMA.reduce(0)
_transforms: Any = plgpu  # pyright takes their classes for abstract


def tiling(dtype) -> tuple:
    """The layout by which TMA writes rows of 128 bytes, so that the tensor cores read them without bank conflicts."""
    return _transforms.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)), _transforms.SwizzleTransform(128)


def pad_rows(x: jax.Array) -> jax.Array:
    """x with zeros after its last row, up to a multiple of 64 rows."""
    return jnp.pad(x, ((0, -x.shape[0] % ROWS), (0, 0))) if x.shape[0] % ROWS else x


def load(x_smem) -> jax.Array:
    """A block of shared memory as float32 in registers."""
    return plgpu.load(x_smem, layout=plgpu.Layout.WGMMA).astype(jnp.float32)


def over_columns(x_T: jax.Array, shape: tuple[int, int] = BLOCK) -> jax.Array:
    """A block whose columns all are x."""
    return lax.broadcast_in_dim(x_T, shape, (0,))


def summed(run, sums: list, shape: tuple[int, int]) -> jax.Array:
    """The sum that a pipeline's steps add to `sums[0]`, an accumulator that stays in registers from step to step."""

    def with_accumulator(accumulator):
        sums.append(accumulator)
        run(None)
        return accumulator[...]

    return pl.run_scoped(with_accumulator, plgpu.ACC(shape, jnp.float32))  # pyright: ignore[reportPrivateImportUsage]
