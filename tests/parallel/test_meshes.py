"""A mesh computes what one device computes: loss, all gradients, loads, 8 steps of training, checkpoints.

float32; sums over devices come in another order, so losses may differ by 2e-6 and gradients by 1e-4 of a tensor's largest.
"""

import chex
import jax
import numpy as np
import pytest

from dsv3_jax.checkpoint.manager import CheckpointManager
from dsv3_jax.config import CheckpointConfig
from dsv3_jax.parallel.layout import layout_for
from dsv3_jax.state.train_state import abstract_state
from dsv3_jax.training.step import make_eval_step
from tests.parallel.cases import (
    MESHES,
    TRAINED,
    WITH_MTP,
    assert_same_gradients,
    batch_of,
    config_of,
    initial_state,
    one_device,
    overrides_of,
    results,
    state_on,
)


@pytest.mark.parametrize(
    "mesh", [m if when == "fast" else pytest.param(m, marks=pytest.mark.slow) for m, when in TRAINED.items()]
)
def test_mesh_equals_one_device(mesh):
    for ours, theirs in zip(results(overrides_of(mesh)), one_device(mesh in WITH_MTP), strict=True):
        (grads, metrics), (expected_grads, expected) = ours.first, theirs.first
        assert float(metrics.loss) == pytest.approx(float(expected.loss), rel=2e-6)
        assert_same_gradients(grads, expected_grads, rtol=1e-4)
        for load, expected_load in zip(metrics.load, expected.load, strict=True):
            np.testing.assert_array_equal(load, expected_load)  # no token is dropped, however hot an expert
        np.testing.assert_allclose(ours.losses, theirs.losses, rtol=1e-4)
    padding = 4 if mesh in WITH_MTP else 5  # of one row's inputs: see `batch_of`
    assert float(expected.load[0].max()) == 16 * 20 - padding  # of the hot ones: every token went to the first experts


@pytest.mark.parametrize("mesh", ["fsdp=2 expert=2 tensor=2", "data=2 pipe=2 expert=2"])
def test_evaluation_on_a_mesh(mesh):
    def sums(overrides):
        config = config_of(overrides)
        layout = layout_for(config)
        state = state_on(config, layout)
        batch = jax.tree.map(lambda a: a[:, :-1], batch_of(config, 0))
        return jax.device_get(make_eval_step(config, layout)(state.params, state.router_bias, batch))

    for ours, theirs in zip(jax.tree.leaves(sums(MESHES[mesh])), jax.tree.leaves(sums([])), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-6)


def test_a_checkpoint_of_any_mesh_is_read_on_any_other(tmp_path):
    """Round through them: each mesh reads what the one before wrote, and the last is what the first was."""
    config = config_of([])
    expected = state = initial_state()
    names = ["data=8", "fsdp=8", "expert=8", "tensor=4", "data=2 pipe=2 fsdp=2 pipe_chunks=2", "fsdp=2 expert=2 tensor=2", None]
    for i, name in enumerate(names):
        manager = CheckpointManager(tmp_path / str(i), CheckpointConfig(keep=1))
        manager.save(state, {"config": {}, "data": {}})
        manager.wait()
        config = config_of(MESHES[name] if name else [])
        template = abstract_state(config, layout_for(config))
        state, _ = manager.restore(template)
        for ours, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(template), strict=True):
            assert ours.sharding == wanted.sharding
    chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(expected))
