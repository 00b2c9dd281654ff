"""Weights that are no numbers are refused before they spread: one NaN makes every output NaN.

They are found by their bits, as integers whose largest shows them: two passes over a buffer that the cache holds, where
`isnan` would need a copy and knows only some of the dtypes.
"""

import ml_dtypes
import numpy as np

from dsv3_jax.checkpoint.direct import ReadInto
from dsv3_jax.errors import UserError

# dtype -> (signed and unsigned integers of its size, the bits of infinity); e4m3 has none, and NaN where it would follow
_BITS = {
    np.dtype(np.float32): (np.int32, np.uint32, 0x7F800000),
    np.dtype(np.float16): (np.int16, np.uint16, 0x7C00),
    np.dtype(ml_dtypes.bfloat16): (np.int16, np.uint16, 0x7F80),
    np.dtype(ml_dtypes.float8_e4m3fn): (np.int8, np.uint8, 0x7F),
}
_LARGEST_SCALE = np.finfo(np.float32).max / np.float32(448)  # 448: the largest number of e4m3


def _all_numbers(x: np.ndarray, infinity: bool) -> bool:
    signed, unsigned, limit = _BITS[x.dtype]
    limit += infinity
    sign = 1 << (8 * x.dtype.itemsize - 1)
    return not x.size or bool(x.view(signed).max() < limit and x.view(unsigned).max() < sign + limit)


def _may_be_infinite(tensor: str) -> bool:
    """A balancing bias of -infinity takes an expert out of the choice."""
    return tensor.endswith("e_score_correction_bias")


def check_numbers(x: np.ndarray, where: str, tensor: str) -> None:
    """Raise `UserError` if a tensor, or a part of one, holds NaN or infinity. `x` may have its axes in any order."""
    if not _all_numbers(x, _may_be_infinite(tensor)):
        raise UserError(f"{where}: tensor {tensor} holds NaN or infinity: it is damaged, or its training had diverged")


def check_scales(x: np.ndarray, where: str, tensor: str) -> None:
    """Raise `UserError` if scales (float32) of 8-bit weights are NaN, negative, or so large that weights could be infinite."""
    bad = ~((x >= 0) & (x <= _LARGEST_SCALE))
    if bad.any():
        raise UserError(f"{where}: tensor {tensor} holds a scale of {x[bad][0]}; scales are 0 to {_LARGEST_SCALE:.3g}")


def check_exact(x: np.ndarray, where: str, tensor: str) -> np.ndarray:
    """f64 numbers as float32. Raises `UserError` if one would be rounded."""
    with np.errstate(over="ignore"):
        rounded = x.astype(np.float32)
    if not np.array_equal(rounded, x, equal_nan=True):
        at = np.unravel_index(np.flatnonzero(rounded != x)[0], x.shape)
        raise UserError(f"{where}: tensor {tensor} is in float64 and holds {x[at]!r}, which float32 does not")
    return rounded


def checked(read: ReadInto, dtype: np.dtype, where: str, tensor: str) -> ReadInto:
    """`read`, looking at the numbers of a tensor while they pass. Raises as `check_numbers`."""

    def fill(buffer: memoryview) -> int:
        size = 0
        while size < len(buffer) and (got := read(buffer[size:])):
            size += got
        check_numbers(np.frombuffer(buffer[:size], dtype), where, tensor)
        return size

    return fill
