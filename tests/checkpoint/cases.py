"""A training state that is quickly made and shows its step in every number, and checkpoints of it."""

import jax.numpy as jnp
import numpy as np

from dsv3_jax.checkpoint.manager import CheckpointManager
from dsv3_jax.config import CheckpointConfig
from dsv3_jax.state.train_state import TrainState

KEEP_ALL = CheckpointConfig(keep=9)
ABOUT = {"config": {}, "data": {}}


def numbers(step: int, size: int) -> np.ndarray:
    return np.random.default_rng(step).standard_normal(size, np.float32)


def state_of(step: int, size: int = 1000) -> TrainState:
    array = jnp.asarray(numbers(step, size))
    return TrainState(jnp.int32(step), {"a": array, "b": array[:3]}, {}, {"mu": array * 2}, None, {})  # type: ignore[arg-type]


def assert_is(state: TrainState, step: int, size: int = 1000) -> None:
    assert int(state.step) == step
    np.testing.assert_array_equal(state.params["a"], numbers(step, size))
    np.testing.assert_array_equal(state.opt_state["mu"], numbers(step, size) * 2)


def saved(directory, steps, config=KEEP_ALL, losses=()) -> CheckpointManager:
    manager = CheckpointManager(directory, config)
    for i, step in enumerate(steps):
        manager.save(state_of(step), ABOUT | ({"held_out_loss": losses[i]} if losses else {}))
    manager.wait()
    return manager
