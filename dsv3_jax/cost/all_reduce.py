"""All-reduces by an alpha-beta model: a message takes alpha + bytes / beta, and a rank sends one at a time."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """A link as one rank sees it."""

    alpha: float  # seconds per message
    beta: float  # bytes per second and rank, one way


def ring(size: float, ranks: int, link: Link) -> float:
    """Seconds of an all-reduce of `size` bytes by a ring: each of 2 (ranks - 1) steps sends one part to the next."""
    return 2 * (ranks - 1) * (link.alpha + size / ranks / link.beta)


def tree(size: float, ranks: int, link: Link) -> float:
    """Seconds of the same by a double binary tree: up and down, half of the bytes in each of two trees, as a pipeline."""
    return 2 * math.ceil(math.log2(ranks)) * link.alpha + 2 * size / link.beta if ranks > 1 else 0.0
