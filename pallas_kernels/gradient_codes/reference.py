"""Codes of 1 to 8 bits for blocks of numbers, in plain JAX: the definition that the kernels are held to.

A block's scale is its root mean square (`gaussian` levels) or its largest magnitude; its numbers become the nearest of
`levels`, ascending, in units of the scale.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from pallas_kernels.errors import Unavailable

BLOCK = 256  # numbers of a block that the kernels are laid out for
TINY = 1e-30  # a block of smaller numbers is sent as zeros: dividing by its scale would overflow


class Levels(NamedTuple):
    """The numbers that codes stand for; static."""

    values: tuple[float, ...]  # 2^bits of them, ascending
    of_rms: bool  # in units of a block's root mean square; else of its largest magnitude, and equally spaced

    @property
    def bits(self) -> int:
        return len(self.values).bit_length() - 1


def ratio(x: Array, scale: Array) -> Array:
    """x / scale. XLA may multiply by 1 / scale instead, which of the largest numbers is taken for zero."""
    return (x * 2.0**-10) / (scale * 2.0**-10)


def scaled(x: Float[Array, "*rows block"], levels: Levels) -> tuple[Float[Array, "*rows block"], Float[Array, "*rows 1"]]:
    """(numbers in units of their block's scale, the scales). A number that is not finite makes its block so."""
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    if levels.of_rms:
        # squares of numbers up to 1, whatever the numbers are
        scale = largest * jnp.sqrt(jnp.mean(jnp.square(ratio(x, jnp.maximum(largest, TINY))), axis=-1, keepdims=True))
    else:
        scale = largest + jnp.sum(0 * x, axis=-1, keepdims=True)  # a maximum may pass over NaN, on CPUs
    scale = jnp.where(scale < TINY, 0.0, scale)
    return ratio(x, jnp.where(scale == 0, 1.0, scale)), scale


def code_of(unit: Float[Array, "..."], levels: Levels) -> Array:
    """int32 code of the nearest level."""
    if levels.of_rms:
        edges = [float(edge) for edge in (np.array(levels.values[1:]) + np.array(levels.values[:-1])) / 2]
        code = jnp.zeros(unit.shape, jnp.int32)
        for edge in edges:
            code += (unit > edge).astype(jnp.int32)
        return code
    last = len(levels.values) - 1
    return jnp.clip(jnp.round((unit + 1) / 2 * last), 0, last).astype(jnp.int32)


def level_of(code: Array, levels: Levels) -> Float[Array, "..."]:
    """The level of each code: by comparisons, which vectorise where looking up does not, or arithmetic for equal spacing."""
    if not levels.of_rms:
        return code.astype(jnp.float32) * (2 / (len(levels.values) - 1)) - 1
    level = jnp.full(code.shape, levels.values[0], jnp.float32)
    for i, value in enumerate(levels.values[1:], 1):
        level = jnp.where(code >= i, jnp.float32(value), level)
    return level


def rounded(x: Float[Array, "*rows block"], levels: Levels) -> Float[Array, "*rows block"]:
    """The numbers that the codes of x stand for, without the bytes between."""
    numbers, scale = scaled(x, levels)
    return level_of(code_of(numbers, levels), levels) * scale


def packed(code: Array, bits: int) -> UInt8[Array, "*rows bytes"]:
    """Byte i has numbers i, i + bytes, i + 2 bytes and so on: neighbours stay neighbours, which suits vector units."""
    width = code.shape[-1] * bits // 8
    total = code[..., :width]
    for place in range(1, 8 // bits):
        total = total | (code[..., place * width : (place + 1) * width] << (place * bits))
    return total.astype(jnp.uint8)


def unpacked(codes: UInt8[Array, "*rows bytes"], bits: int) -> Array:
    """int32 codes [*rows, block] out of bytes."""
    wide = codes.astype(jnp.int32)
    return jnp.concatenate([(wide >> (place * bits)) & (2**bits - 1) for place in range(8 // bits)], axis=-1)


def pack(x: Float[Array, "rows block"], error: Float[Array, "rows block"], unit: Float[Array, "rows block"], levels: Levels):
    """See `api.pack_codes`."""
    wanted = x + error
    numbers, scale = scaled(wanted / unit, levels)
    code = code_of(numbers, levels)
    return packed(code, levels.bits), scale[..., 0], wanted - level_of(code, levels) * scale * unit


def require_block(operation: str, kernel: str, block: int) -> None:
    """Raises `Unavailable` for blocks that the kernels are not laid out for."""
    if block != BLOCK:
        raise Unavailable(f"{operation}: the {kernel} kernel takes blocks of {BLOCK} numbers, not {block}; use xla")


def mean(codes: UInt8[Array, "replicas rows bytes"], scales: Float[Array, "replicas rows"], levels: Levels):
    """See `api.mean_of_codes`."""
    return (level_of(unpacked(codes, levels.bits), levels) * scales[..., None]).mean(0)
