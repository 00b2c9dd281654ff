"""All-reduces by an alpha-beta model: a message takes alpha + bytes / beta, and a rank sends one at a time."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    alpha: float  # seconds a message
    beta: float  # bytes a second, one way, a rank


def ring(size: float, ranks: int, link: Link) -> float:
    """All-reduce of `size` bytes: each of 2 (ranks - 1) steps sends one part to the next."""
    return 2 * (ranks - 1) * (link.alpha + size / ranks / link.beta)


def tree(size: float, ranks: int, link: Link) -> float:
    """Double binary tree: up and down, each half of the bytes in one of two trees, in pieces that follow each other."""
    return 2 * math.ceil(math.log2(ranks)) * link.alpha + 2 * size / link.beta if ranks > 1 else 0.0
