"""What the element-wise kernels for NVIDIA Hopper (Mosaic GPU) share: a warpgroup works on 64 rows of a tile of 128 numbers."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.scaled import TILE

ROWS = 64  # of a program: four float32 tiles of 128 rows would not fit a warpgroup's registers
BLOCK = (ROWS, TILE)


def pad_rows(x: jax.Array) -> jax.Array:
    """Zeros after the last row, up to whole blocks."""
    return jnp.pad(x, ((0, -x.shape[0] % ROWS), (0, 0))) if x.shape[0] % ROWS else x


def load(x_smem) -> jax.Array:
    """A block of shared memory, in float32."""
    return plgpu.load(x_smem, layout=plgpu.Layout.WGMMA).astype(jnp.float32)


def over_columns(x_T: jax.Array) -> jax.Array:
    """A block from one number a row."""
    return lax.broadcast_in_dim(x_T, BLOCK, (0,))
