"""A training state that is quickly made and tells its step by every number."""

import jax.numpy as jnp
import numpy as np

from dsv3_jax.state.train_state import TrainState


def numbers(step: int, size: int) -> np.ndarray:
    return np.random.default_rng(step).standard_normal(size, np.float32)


def state_of(step: int, size: int = 1000) -> TrainState:
    array = jnp.asarray(numbers(step, size))
    return TrainState(jnp.int32(step), {"a": array, "b": array[:3]}, {}, {"mu": array * 2}, None, {})  # type: ignore[arg-type]


def assert_is(state: TrainState, step: int, size: int = 1000) -> None:
    assert int(state.step) == step
    np.testing.assert_array_equal(state.params["a"], numbers(step, size))
    np.testing.assert_array_equal(state.opt_state["mu"], numbers(step, size) * 2)
