"""Shared parts of the kernels for TPU (Mosaic)."""

from pallas_kernels.scaled import TILE


def block_columns(K: int, most: int) -> int:
    """Columns of the widest block of at most `most` that is a multiple of 128 and divides K, which is one too."""
    return max(c for c in range(TILE, min(K, most) + 1, TILE) if K % c == 0)
