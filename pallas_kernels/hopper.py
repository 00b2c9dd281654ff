"""What the kernels for NVIDIA Hopper (Mosaic GPU) share: a warpgroup works on 64 rows, mostly of a tile of 128 numbers."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.scaled import TILE

ROWS = 64  # of a program: four float32 tiles of 128 rows would not fit a warpgroup's registers
BLOCK = (ROWS, TILE)
ROW = plgpu.Layout.WGMMA.reduce(1)  # of registers with one number for each row of a block
COLUMN = plgpu.Layout.WGMMA.reduce(0)
_transforms: Any = plgpu  # pyright takes their classes for abstract


def tiling(dtype) -> tuple:
    """How TMA lays out rows of 128 bytes so that the tensor cores read them without bank conflicts."""
    return _transforms.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)), _transforms.SwizzleTransform(128)


def pad_rows(x: jax.Array) -> jax.Array:
    """Zeros after the last row, up to whole blocks."""
    return jnp.pad(x, ((0, -x.shape[0] % ROWS), (0, 0))) if x.shape[0] % ROWS else x


def load(x_smem) -> jax.Array:
    """A block of shared memory, in float32."""
    return plgpu.load(x_smem, layout=plgpu.Layout.WGMMA).astype(jnp.float32)


def over_columns(x_T: jax.Array, shape: tuple[int, int] = BLOCK) -> jax.Array:
    """A block from one number a row."""
    return lax.broadcast_in_dim(x_T, shape, (0,))


def summed(run, sums: list, shape: tuple[int, int]) -> jax.Array:
    """What a pipeline's steps add to `sums[0]`, an accumulator that stays in registers from step to step."""

    def with_accumulator(accumulator):
        sums.append(accumulator)
        run(None)
        return accumulator[...]

    return pl.run_scoped(with_accumulator, plgpu.ACC(shape, jnp.float32))  # pyright: ignore[reportPrivateImportUsage]
