"""8-bit numbers with one scale for each tile, which the low-precision kernels exchange (arXiv 2412.19437, section 3.3)."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

TILE: Literal[128] = 128  # numbers that share a scale, along the axis that a matrix product sums over

Format = Literal["e4m3", "e5m2", "int8"]
DTYPES: dict[Format, jnp.dtype] = {
    "e4m3": jnp.dtype("float8_e4m3fn"),
    "e5m2": jnp.dtype("float8_e5m2"),
    "int8": jnp.dtype("int8"),
}
LARGEST: dict[Format, float] = {"e4m3": 448.0, "e5m2": 57344.0, "int8": 127.0}  # code of a tile's largest magnitude


class Scaled(NamedTuple):
    """A matrix [M, K] whose entry (m, k) is values[m, k] * scales[k // 128, m // rows].

    `rows` is 1 (tiles of 1 x 128, for activations) or 128 (blocks of 128 x 128, for weights). A product sums along K.
    """

    values: Array  # [M, K], of one of DTYPES
    scales: Float[Array, "k_tiles m_groups"]  # float32

    @property
    def rows(self) -> int:
        return 1 if self.scales.shape[1] == self.values.shape[0] else TILE

    def row_scales(self) -> Float[Array, "k_tiles M"]:
        """float32 scales [k_tiles, M], one for each row."""
        M = self.values.shape[0]
        return self.scales if self.rows == 1 else jnp.repeat(self.scales, TILE, axis=1)[:, :M]

    def transposed(self) -> "Scaled":
        """The transposed matrix [K, M], whose product sums along M: the same numbers, because blocks are square."""
        assert self.rows == TILE, "tiles of 1 x 128 lie along one axis: quantise the transposed matrix instead"
        return Scaled(self.values.T, self.scales.T)


def tiles(size: int) -> int:
    """Number of tiles that cover an axis of `size` numbers; the last may be smaller."""
    return -(-size // TILE)


def pad_to_tiles(x: Shaped[Array, "M K"], rows: int) -> Shaped[Array, "..."]:
    """x with zeros after the end of both axes, up to whole tiles of `rows` x 128."""
    M, K = x.shape
    return jnp.pad(x, ((0, -M % rows), (0, -K % TILE))) if M % rows or K % TILE else x


def bits(x: Scaled) -> Scaled:
    """x with values as int8 bit patterns, to move and to keep: XLA:CPU widens an entire stack of float8 numbers to move one."""
    return x._replace(values=lax.bitcast_convert_type(x.values, jnp.int8))


def from_bits(x: Scaled, format: Format) -> Scaled:
    """The inverse of `bits`: values of `format` from int8 bit patterns."""
    return x._replace(values=lax.bitcast_convert_type(x.values, DTYPES[format]))


def dequantize(x: Scaled) -> Float[Array, "M K"]:
    """The float32 numbers that values and scales stand for."""
    K = x.values.shape[1]
    return x.values.astype(jnp.float32) * jnp.repeat(x.row_scales().T, TILE, axis=1)[:, :K]


@dataclass(frozen=True)
class Gemms:
    """The formats of a linear layer's three products, y = x w, dx = dy w^T and dw = x^T dy (arXiv 2412.19437, figure 6).

    Activations have a scale for each 1 x 128 numbers along the axis that is summed over (for dw: 128 tokens), weights one for
    each 128 x 128.
    `per_tensor` gives each array a single scale, to compare with. `implementation` is that of every operation in 8 bits.
    """

    forward: Format = "e4m3"
    dgrad: Format = "e4m3"
    wgrad: Format = "e4m3"
    power_of_two: bool = False
    per_tensor: bool = False
    implementation: str = "auto"
