"""Collectives inside `shard_map` over any number of mesh axes. Over none they return their argument.

`dim` is the array axis that is sharded over `axes`, major first.
"""

from typing import Any

from jax import lax
from jaxtyping import Array

Axes = tuple[str, ...]  # mesh axes


def all_gather(x: Array, axes: Axes, dim: int) -> Array:
    """The devices' shards, joined along `dim`."""
    return lax.all_gather(x, axes, axis=dim, tiled=True) if axes else x


def reduce_scatter(x: Array, axes: Axes, dim: int) -> Array:
    """The sum over devices, of which each gets its shard along `dim`."""
    return lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True) if axes else x


def all_reduce(tree: Any, axes: Axes) -> Any:
    """The sum over devices."""
    return lax.psum(tree, axes) if axes else tree


def all_to_all(x: Array, axes: Axes, split: int, join: int) -> Array:
    """`x`, sharded along `join`, sharded along `split` instead."""
    return lax.all_to_all(x, axes, split, join, tiled=True) if axes else x


def index(axes: Axes) -> Array | int:
    """This device's number along `axes`."""
    return lax.axis_index(axes) if axes else 0
