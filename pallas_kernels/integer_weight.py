"""Weights in few bits: integer codes, with a scale for each group of inputs, w = scale * (code - zero).

The layout that GPTQ's tools write (arXiv 2210.17323): codes are unsigned, a group is `group` inputs that follow each other and
belong to one output. Symmetric codes have their zero in the middle, 2^(bits-1), so that no zero points are stored. Scales are
float16 with at most 8 significant bits: the same number in float16 and in bfloat16, whichever a client computes in.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float16, Float32, UInt8

BITS = (2, 4, 8)  # that divide a byte


@dataclass(frozen=True)
class IntegerFormat:
    """How many bits a code has, how many inputs share a scale, and whether groups have zero points of their own."""

    bits: int
    group: int
    symmetric: bool = True

    @property
    def levels(self) -> int:
        """How many values a code has."""
        return 2**self.bits

    @property
    def middle(self) -> int:
        """The code of zero in a symmetric format."""
        return self.levels // 2

    @property
    def codes_per_byte(self) -> int:
        return 8 // self.bits

    def of(self, inputs: int) -> "IntegerFormat":
        """The format of a matrix with this many inputs: where they are fewer than a group, they are one group."""
        return replace(self, group=min(self.group, inputs))

    def bits_per_weight(self) -> float:
        """Stored bits of a weight with its share of scale and zero point."""
        return self.bits + (16 + (0 if self.symmetric else 8)) / self.group


def pack(codes: UInt8[Array, "*X"], bits: int, axis: int) -> UInt8[Array, "*Y"]:
    """Codes below 2^bits, 8/bits to a byte along an axis: code i of a byte is its bits i*bits .. (i+1)*bits."""
    per_byte = 8 // bits
    codes = jnp.moveaxis(codes, axis, -1)
    parts = codes.reshape(*codes.shape[:-1], -1, per_byte) << (bits * jnp.arange(per_byte, dtype=jnp.uint8))
    return jnp.moveaxis(jnp.bitwise_or.reduce(parts, axis=-1), -1, axis)


def unpack(packed: UInt8[Array, "*Y"], bits: int, axis: int) -> UInt8[Array, "*X"]:
    """The inverse of `pack`."""
    per_byte = 8 // bits
    packed = jnp.moveaxis(packed, axis, -1)
    parts = (packed[..., None] >> (bits * jnp.arange(per_byte, dtype=jnp.uint8))) & jnp.uint8(2**bits - 1)
    return jnp.moveaxis(parts.reshape(*packed.shape[:-1], -1), -1, axis)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class IntegerWeight:
    """A weight [*lead, *inputs, *outputs] in an integer format; `lead` may be layers and experts.

    A pytree of arrays, so that layers are scanned over, taken out of their stack and sharded as dense weights are. `inputs` are
    one axis in its arrays: K = prod(inputs), of which a byte of `codes` has 8/bits.
    """

    codes: Any  # u8[*lead, K * bits / 8, *outputs], see `pack`
    scale: Any  # f16[*lead, K / group, *outputs]
    zero: Any  # u8[*lead, K / group, *outputs]; None: 2^(bits-1) everywhere
    format: IntegerFormat = field(metadata={"static": True})
    inputs: tuple[int, ...] = field(metadata={"static": True})
    outputs: int = field(metadata={"static": True})  # number of output axes
    merged: tuple[int, ...] | None = field(default=None, metadata={"static": True})  # outputs that are one axis in the arrays

    @property
    def axis(self) -> int:
        """The inputs' axis in all arrays, counted from the end."""
        return -1 - (self.outputs if self.merged is None else 1)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that this stands for."""
        stored = self.codes.shape
        cut = len(stored) + self.axis
        return (*stored[:cut], *self.inputs, *(stored[cut + 1 :] if self.merged is None else self.merged))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays."""
        return sum(a.nbytes for a in (self.codes, self.scale, self.zero) if a is not None)

    def side_by_side(self) -> "IntegerWeight":
        """The same weight with its outputs as one axis of the arrays.

        Where memory is tiled, as on TPUs, a kernel would need a copy to see several axes as one, and at every call.
        """
        if self.outputs == 1 or self.merged is not None:
            return self
        cut = self.codes.ndim + self.axis + 1
        outputs = self.codes.shape[cut:]
        return replace(jax.tree.map(lambda a: a.reshape(*a.shape[:cut], math.prod(outputs)), self), merged=outputs)

    def __getitem__(self, index: Any) -> "IntegerWeight":
        """Itself for `...`; otherwise what the index leaves of the leading axes."""
        return self if index is Ellipsis else jax.tree.map(lambda a: a[index], self)

    def reshape(self, *shape: int) -> "IntegerWeight":
        """With its inputs as one axis: the only other shape that a weight without leading axes is wanted in."""
        K = math.prod(self.inputs)
        if math.prod(shape) != self.size or shape[0] != K:
            raise ValueError(f"an integer weight of shape {self.shape} can only merge its inputs, not take the shape {shape}")
        outputs = shape[1:]
        reshaped = jax.tree.map(lambda a: a.reshape(a.shape[0], *outputs), self)
        return replace(reshaped, inputs=(K,), outputs=len(outputs), merged=None)

    def astype(self, dtype: Any) -> Array:
        """The dense weight in a dtype."""
        return dequantize(self).astype(dtype)


def unpacked(w: IntegerWeight) -> UInt8[Array, "*X"]:
    """u8[*lead, K, *outputs]: one code each."""
    return unpack(w.codes, w.format.bits, w.axis)


def dequantize(w: IntegerWeight) -> Float32[Array, "*X"]:
    """f32[*lead, *inputs, *outputs], the definition: scale * (code - zero), exact in float32."""

    def spread(per_group: Array) -> Array:
        return jnp.repeat(per_group, w.format.group, axis=w.axis)

    zero = w.format.middle if w.zero is None else spread(w.zero).astype(jnp.float32)
    return (spread(w.scale).astype(jnp.float32) * (unpacked(w).astype(jnp.float32) - zero)).reshape(w.shape)


def storable(scale: Float32[Array, "*X"]) -> Float16[Array, "*X"]:
    """The nearest scales that float16 and bfloat16 both have: float16 with at most 8 significant bits."""
    return scale.astype(jnp.float16).astype(jnp.bfloat16).astype(jnp.float16)
