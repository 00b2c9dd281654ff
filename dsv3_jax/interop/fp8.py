"""DeepSeek's block-FP8 layout: e4m3 values, and one float32 `weight_scale_inv` for every 128 x 128 block; w = value * scale.

The last blocks of an axis may be ragged.
"""

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


@jax.jit
def _quantize(w_MN):
    return reference.quantize(w_MN, TILE, "e4m3", False)


def quantize(w_MN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(e4m3[M, N], f32 scales): every block's largest magnitude becomes 448 (arXiv 2412.19437, section 3.3.2)."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):  # accelerators may be busy or full
        found = _quantize(jnp.asarray(w_MN, jnp.float32))
    return np.asarray(found.values), np.ascontiguousarray(np.asarray(found.scales).T)
