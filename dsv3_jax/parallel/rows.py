"""Which rows of a batch this process's devices hold, and how they become one array on the mesh."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from dsv3_jax.data.batch import Batch
from dsv3_jax.model.layout import Layout


def local_rows(layout: Layout, batch_size: int) -> list[int]:
    """Rows of a batch that this process has to load, ascending. Processes whose devices hold the same rows all load them."""
    sharding = layout.batch_sharding
    slices = (index[0] for index in sharding.addressable_devices_indices_map((batch_size,)).values() if index)
    return sorted({row for s in slices for row in range(*s.indices(batch_size))})


def place(layout: Layout, batch: Batch, rows: Sequence[int], batch_size: int) -> Batch:
    """A global batch [batch_size, ...] from the `rows` of it that this process has."""
    sharding = layout.batch_sharding
    position = {row: i for i, row in enumerate(rows)}

    def piece(array: np.ndarray, index: Any) -> np.ndarray:
        return array[[position[row] for row in range(*index[0].indices(batch_size))]]

    def on_devices(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback((batch_size, *array.shape[1:]), sharding, lambda index: piece(array, index))

    return jax.tree.map(on_devices, batch)
