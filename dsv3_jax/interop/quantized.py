"""Matrices in an integer format, in Hugging Face's orientation: what every export writes, each in its own packing."""

from dataclasses import dataclass

import jax
import numpy as np

from dsv3_jax.interop.hf_tensors import Source, pairs
from pallas_kernels.integer_weight import IntegerFormat, IntegerWeight, unpacked


@dataclass(frozen=True)
class QuantizedTensor:
    """w[out, in] = scale * (code - zero), a scale and a zero for each `format.group` inputs of an output."""

    codes: np.ndarray  # u8[out, in], one code each
    scale: np.ndarray  # f16[out, in / group]
    zero: np.ndarray | None  # u8[out, in / group]; None: format.middle everywhere
    format: IntegerFormat

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def zeros(self) -> np.ndarray:
        """u8[out, in / group], those of a symmetric format too."""
        return np.full(self.scale.shape, self.format.middle, np.uint8) if self.zero is None else self.zero

    def rows(self, index: slice | np.ndarray) -> "QuantizedTensor":
        """Some of the outputs."""
        return QuantizedTensor(
            self.codes[index], self.scale[index], None if self.zero is None else self.zero[index], self.format
        )

    def dequantize(self) -> np.ndarray:
        """f32[out, in], exactly."""
        grouped = self.codes.reshape(len(self.codes), -1, self.format.group).astype(np.float32)
        w = self.scale.astype(np.float32)[..., None] * (grouped - self.zeros[..., None])
        return w.reshape(self.shape)


type Tensor = np.ndarray | QuantizedTensor  # what is read to be exported


def as_dense(tensor: Tensor) -> np.ndarray:
    """The numbers themselves."""
    return tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor


def from_region(s: Source, w: IntegerWeight) -> QuantizedTensor:
    """A matrix's codes, scales and zeros from its region of our array: `integer_index` of the integer weight's arrays.

    Outputs come first, heads and what each has as one axis, rotated ones as the pairs that released checkpoints have.
    """

    def outputs_first(x: np.ndarray) -> np.ndarray:
        x = pairs(x, s.rope, -1) if s.rope else x
        return np.ascontiguousarray(np.moveaxis(x, 0, -1).reshape(-1, len(x)))

    with jax.default_device(jax.local_devices(backend="cpu")[0]):  # accelerators may be busy or full
        codes = np.asarray(unpacked(w))
    zero = None if w.zero is None else outputs_first(np.asarray(w.zero))
    return QuantizedTensor(outputs_first(codes), outputs_first(np.asarray(w.scale)), zero, w.format)


def nibbles(codes: np.ndarray, bits: int) -> np.ndarray:
    """i32[..., ceil(n * bits / 32)]: 32 / bits codes to a word along the last axis, the first in its lowest bits."""
    per_word = 32 // bits
    codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % per_word)])
    parts = codes.reshape(*codes.shape[:-1], -1, per_word).astype(np.uint32) << (bits * np.arange(per_word, dtype=np.uint32))
    return np.bitwise_or.reduce(parts, axis=-1).view(np.int32)
