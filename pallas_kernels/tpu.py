"""What the kernels for TPU (Mosaic) share: sizes of blocks, and padding to whole tiles."""

from pallas_kernels.scaled import TILE


def block_columns(K: int, most: int) -> int:
    """The widest block of whole tiles, of at most `most` columns, that divides K (a multiple of 128)."""
    return max(c for c in range(TILE, min(K, most) + 1, TILE) if K % c == 0)
