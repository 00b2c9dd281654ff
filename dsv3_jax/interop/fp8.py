"""DeepSeek's block-FP8 layout: e4m3 values, and one `weight_scale_inv` for every 128 x 128 block; w = value * scale.

The last blocks of an axis may be ragged. There are two kinds of scales: float32 numbers (V3), and powers of two (V3.1), which
are stored as float32 too, or as their exponents alone (float8_e8m0fnu).
"""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels.quantize import reference
from pallas_kernels.scaled import TILE, tiles

SUFFIX = "_scale_inv"  # what the name of the scales' tensor adds to the weight's
VALUES = np.dtype(ml_dtypes.float8_e4m3fn)
# what config.json says of such a checkpoint
QUANTIZATION_CONFIG = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [TILE, TILE],
}  # fmt: skip
POWERS_OF_TWO = "ue8m0"  # quantization_config.scale_fmt where all scales are powers of two
# The smallest value, 2^-9, times a scale below this is subnormal: several values become one weight, which does not say which.
_SMALLEST_SCALE = np.finfo(np.float32).tiny * 2**9
_OF_BYTE = np.arange(256, dtype=np.uint8).view(VALUES).astype(np.float32)


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape of the scales of a matrix of this shape."""
    rows, columns = shape
    return tiles(rows), tiles(columns)


def dequantize(values_MN: np.ndarray, scale_inv: np.ndarray) -> np.ndarray:
    """f32[M, N], exactly value * scale."""
    out_MN = _OF_BYTE[values_MN.view(np.uint8)]
    for i, scale in enumerate(scale_inv.astype(np.float32)):
        out_MN[i * TILE : (i + 1) * TILE] *= np.repeat(scale, TILE)[: out_MN.shape[1]]
    return out_MN


@partial(jax.jit, static_argnames="power_of_two")
def _quantize(w_MN, power_of_two):
    found = reference.quantize(w_MN.astype(jnp.float32), TILE, "e4m3", power_of_two)
    return found.values, found.scales.T


@partial(jax.jit, static_argnames="power_of_two")
def _quantize_as_before(w_MN, scales, power_of_two):
    (M, N), (rows, columns) = w_MN.shape, scales.shape

    def spread(per_block):
        return jnp.repeat(jnp.repeat(per_block, TILE, axis=0), TILE, axis=1)[:M, :N]

    def blocks(x):
        return jnp.pad(x, ((0, -M % TILE), (0, -N % TILE))).reshape(rows, TILE, columns, TILE)

    scale_MN = spread(scales)
    w32_MN = w_MN.astype(jnp.float32)
    values = reference.encode(w32_MN / jnp.where(scale_MN == 0, 1, scale_MN), 1, "e4m3")
    # as numbers, and not as bits: -0 and 0 are the same, and each keeps its sign
    differs = (values.astype(jnp.float32) * scale_MN).astype(w_MN.dtype) != w_MN
    changed = jnp.any(blocks(differs), axis=(1, 3))
    new_values, new_scales = _quantize(w_MN, power_of_two)
    return jnp.where(spread(changed), new_values, values), jnp.where(changed, new_scales, scales)


def loses_values(scale_inv: np.ndarray) -> bool:
    """Whether values times these scales may be weights that no longer say what the values were, as all are times 0."""
    return bool((scale_inv.astype(np.float32) < _SMALLEST_SCALE).any())


def _unchanged(w_MN: np.ndarray, values_MN: np.ndarray, scale_inv: np.ndarray) -> np.ndarray:
    """bool[blocks]: where weights are still values * scale. By numpy: XLA takes subnormal numbers for zeros."""
    (M, N), (rows, columns) = w_MN.shape, scale_inv.shape
    same_MN = dequantize(values_MN, scale_inv).astype(w_MN.dtype) == w_MN
    padded = np.pad(same_MN, ((0, -M % TILE), (0, -N % TILE)), constant_values=True)
    return padded.reshape(rows, TILE, columns, TILE).all(axis=(1, 3))


def quantize(
    w_MN: np.ndarray, before: np.ndarray | None = None, power_of_two: bool = False, values_before: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(e4m3[M, N], f32 scales): every block's largest magnitude becomes 448 (arXiv 2412.19437, section 3.3.2).

    With scales that are powers of two, it becomes a number of (224, 448]. `before` are the scales that the weights were once
    read with: where a block is still exactly values times its scale, in the dtype of `w_MN`, it gets these back.
    `values_before` are those values, needed where the scales `loses_values`.
    """
    with jax.default_device(jax.local_devices(backend="cpu")[0]):  # accelerators may be busy or full
        if before is None:
            found = _quantize(jnp.asarray(w_MN), power_of_two)
        else:
            found = _quantize_as_before(jnp.asarray(w_MN), jnp.asarray(before, jnp.float32), power_of_two)
    values, scales = np.asarray(found[0]), np.ascontiguousarray(found[1])
    if before is None or values_before is None:
        return values, scales
    unchanged = _unchanged(w_MN, values_before, before)
    spread_MN = unchanged.repeat(TILE, axis=0).repeat(TILE, axis=1)[: w_MN.shape[0], : w_MN.shape[1]]
    return np.where(spread_MN, values_before, values), np.where(unchanged, before.astype(np.float32), scales)
