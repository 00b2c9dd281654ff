"""Numbers as codes of 1, 2, 4 or 8 bits, with one scale for each block of them."""

import functools
import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.gradient_codes.reference import Levels, rounded

SCALE_BYTES = 4
SMALLEST_BLOCK = 8  # whose codes of 1 bit are a byte
_LLOYD_STEPS = 2000


@functools.cache
def _gaussian_levels(bits: int) -> np.ndarray:
    """The 2^bits numbers that are nearest, in mean square, to a standard normal one (Lloyd, 1982; Max, 1960).

    Each level is the mean of what is rounded to it, which ends midway to its neighbours.
    """
    levels = np.linspace(-2, 2, 2**bits) if bits > 1 else np.array([-1.0, 1.0])

    def density(t: np.ndarray) -> np.ndarray:
        return np.exp(-(t**2) / 2) / math.sqrt(2 * math.pi)

    def below(t: np.ndarray) -> np.ndarray:
        return np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in t])

    for _ in range(_LLOYD_STEPS):
        edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
        levels = -np.diff(density(edges)) / np.diff(below(edges))
    return levels.astype(np.float32)


@dataclass(frozen=True)
class Codec:
    """Numbers as codes of `bits` and a float32 scale for each `block` of them.

    Levels are `gaussian`, the best ones for normal numbers, times a block's root mean square; or `uniform`, from its largest
    magnitude down to minus that. 8 bits are always uniform. Raises ValueError for other arguments.
    """

    bits: Literal[1, 2, 4, 8] = 2
    block: int = 256
    levels: Literal["gaussian", "uniform"] = "gaussian"

    def __post_init__(self):
        if self.bits not in (1, 2, 4, 8):
            raise ValueError(f"bits={self.bits}: use 1, 2, 4 or 8")
        if self.block < SMALLEST_BLOCK or self.block % 8:
            raise ValueError(f"block={self.block}: use a multiple of 8")
        if self.levels not in ("gaussian", "uniform"):
            raise ValueError(f"levels={self.levels!r}: use gaussian or uniform")

    @property
    def block_bytes(self) -> int:
        """Bytes of a block's codes and scale."""
        return self.block * self.bits // 8 + SCALE_BYTES

    @property
    def table(self) -> Levels:
        """What codes stand for; no level is zero."""
        if self.levels == "gaussian" and self.bits < 8:
            return Levels(tuple(_gaussian_levels(self.bits).tolist()), of_rms=True)
        return Levels(tuple(np.linspace(-1, 1, 2**self.bits).tolist()), of_rms=False)

    def fitted(self, n: int) -> "Codec":
        """This codec with slightly smaller blocks that hold n numbers with as little padding as possible.

        Padding lowers a block's root mean square, which would make its scale too small.
        """
        blocks = -(-n // self.block)
        return replace(self, block=-(-n // (8 * blocks)) * 8)

    def rounded(self, x: Float[Array, "*rows n"]) -> Float[Array, "*rows n"]:
        """What the codes of x stand for, n being a multiple of `block`. A number that is not finite makes its block so."""
        return rounded(x.reshape(*x.shape[:-1], -1, self.block), self.table).reshape(x.shape)
