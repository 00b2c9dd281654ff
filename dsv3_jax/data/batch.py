"""What the model reads, and which tokens it is to predict."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


class Batch(NamedTuple):
    """Rows of X = L + 1 + depth tokens: L inputs, and the tokens ahead that next-token and MTP targets need.

    Arrays are of NumPy or JAX. `depth` is the number of MTP modules. Tokens of one document share a segment; a token is a
    target of those inputs that lie in the same document; segment -1 is padding.
    """

    tokens: Int[Any, "B X"]
    segments: Int[Any, "B X"]

    @property
    def rows(self) -> int:
        return self.tokens.shape[0]

    def inputs(self, depth: int) -> "Batch":
        """What the main model reads: the first L of each row."""
        L = self._length(depth)
        return Batch(self.tokens[:, :L], self.segments[:, :L])

    def tokens_ahead(self, k: int, depth: int) -> Int[Array, "B L"]:
        """For each input the token k places on: what MTP module k reads (equation 21 of arXiv 2412.19437)."""
        return self.tokens[:, k : k + self._length(depth)]

    def targets(self, k: int, depth: int) -> tuple[Int[Array, "B L"], Bool[Array, "B L"]]:
        """For each input the token k places on, from k = 1, and whether it counts."""
        L = self._length(depth)
        segment_BL = self.segments[:, :L]
        counts_BL = (segment_BL == self.segments[:, k : k + L]) & (segment_BL >= 0)
        return self.tokens_ahead(k, depth), counts_BL

    def target_counts(self, depth: int) -> list[Float[Array, ""]]:
        """The number of targets that count at each lookahead: next token, then each MTP depth."""
        return [jnp.sum(self.targets(k, depth)[1], dtype=jnp.float32) for k in range(1, depth + 2)]

    def _length(self, depth: int) -> int:
        return self.tokens.shape[1] - 1 - depth


def stack(windows: Sequence[Batch]) -> Batch:
    """A batch of rows that have no axis for rows yet."""
    return Batch(*(np.stack(arrays) for arrays in zip(*windows, strict=True)))
