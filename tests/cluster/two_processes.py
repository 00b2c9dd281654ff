"""Run by test_processes.py in each of two processes with four devices: meshes across both against one local device."""

import json
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

from dsv3_jax.cluster.processes import join
from dsv3_jax.config import Config
from dsv3_jax.model.layout import Layout
from dsv3_jax.parallel.layout import layout_for
from dsv3_jax.parallel.rows import local_rows, place
from dsv3_jax.state.train_state import ONE_DEVICE, TrainState, abstract_state, init_state
from dsv3_jax.training.step import gradients, training_recipe
from tests.parallel.cases import MESHES, WITHOUT_MTP, batch_of, config_of


def on_one_device():
    """A fresh state, and its (gradients, metrics), as each process finds them by itself."""
    config = config_of([WITHOUT_MTP])
    with jax.default_device(jax.local_devices()[0]):
        state = jax.jit(lambda: init_state(config))()
        out = jax.jit(lambda s, b: gradients(config, ONE_DEVICE, s, b))(state, batch_of(config, 0))
        return jax.device_get(state), jax.device_get(out)


def spread(config: Config, layout: Layout, state: TrainState) -> TrainState:
    """A state on the host, where the layout wants it."""

    def put(a, abstract):
        return jax.make_array_from_callback(a.shape, abstract.sharding, lambda index: a[index])

    return jax.tree.map(put, state, abstract_state(config, layout))


def compare(mesh: str, state: TrainState, expected) -> dict[str, float]:
    """Largest relative differences of loss and of any gradient tensor on this mesh."""
    config = config_of([*MESHES[mesh], WITHOUT_MTP])
    layout = layout_for(config)
    run = jax.jit(lambda state, batch: gradients(config, layout, state, batch, training_recipe(config, layout)))
    size = config.data.batch_size
    rows = local_rows(layout, size)
    batch = jax.tree.map(lambda a: a[rows], batch_of(config, 0))
    grads, metrics, _ = run(spread(config, layout, state), place(layout, batch, rows, size))
    grads = multihost_utils.process_allgather(grads, tiled=True)
    worst = max(
        float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(a).max())
        for a, b in zip(jax.tree.leaves(expected[0]), jax.tree.leaves(grads), strict=True)
    )
    loss = abs(float(metrics.loss) / float(expected[1].loss) - 1)
    return {"loss": loss, "gradient": worst, "rows": len(rows), "devices": layout.size}


def main() -> None:
    join()
    state, expected = on_one_device()
    results = {mesh: compare(mesh, state, expected) for mesh in sys.argv[1:]}
    if jax.process_index() == 0:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
