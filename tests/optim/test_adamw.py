"""The optimiser against its formulas, and the schedule at its corners."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dsv3_jax.config import OptimConfig
from dsv3_jax.model.parameters import HEAD, NORM
from dsv3_jax.optim.adamw import adamw
from dsv3_jax.optim.optimizer import decays, learning_rate


def params():
    return nnx.State({
        "w": nnx.Param(jnp.asarray([[1.0, -2.0], [3.0, 0.5]]), logical_axes=("a", "b"), kind=HEAD),
        "stacked_norms": nnx.Param(jnp.ones((2, 3)), logical_axes=("norm",), kind=NORM),
    })  # fmt: skip


def test_schedule():
    schedule = learning_rate(OptimConfig(lr=1.0, lr_final=0.1, warmup_steps=4, decay_start=10, decay_steps=10))
    values = [float(schedule(s)) for s in range(25)]
    np.testing.assert_allclose(values[:4], [0.25, 0.5, 0.75, 1.0], rtol=1e-6)
    np.testing.assert_allclose(values[4:11], 1.0)
    assert values[15] == pytest.approx(0.55)
    np.testing.assert_allclose(values[20:], 0.1, rtol=1e-6)


def test_the_decay_is_a_cosine():
    schedule = learning_rate(OptimConfig(lr=1.0, lr_final=0.0, warmup_steps=4, decay_start=10, decay_steps=12))
    np.testing.assert_allclose([schedule(s) for s in (12, 14, 16, 18)], [0.9330127, 0.75, 0.5, 0.25], atol=1e-6)


def test_only_matrices_decay():
    assert [bool(leaf) for leaf in jax.tree.leaves(decays(params()))] == [False, True]


def test_update_follows_the_formula():
    """Three steps of AdamW written out (arXiv 1711.05101, algorithm 2), weight decay times the learning rate."""
    config = OptimConfig(lr=0.1, warmup_steps=0, decay_start=100, weight_decay=0.1)
    optimizer, p = adamw(config), params()
    state = optimizer.init(p)
    w, m, v = np.asarray(p["w"][...]), 0.0, 0.0
    for t in range(1, 4):
        g = np.cos(np.arange(4).reshape(2, 2) + t)
        grads = jax.tree.map(jnp.zeros_like, p)
        grads["w"][...] = jnp.asarray(g, jnp.float32)
        updates, state = optimizer.update(grads, state, p)
        p = optax.apply_updates(p, updates)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        w = w - 0.1 * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8) + 0.1 * w)
        np.testing.assert_allclose(p["w"][...], w, rtol=1e-5)
    np.testing.assert_array_equal(p["stacked_norms"][...], 1.0)


def test_epsilon_is_added_to_the_root():
    """A first gradient of 1 moves by lr / (1 + eps), whatever the moments' rates."""
    config = OptimConfig(lr=0.1, warmup_steps=0, decay_start=100, weight_decay=0.0, eps=1.0)
    optimizer, p = adamw(config), params()
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, p), optimizer.init(p), p)
    np.testing.assert_allclose(jax.tree.leaves(updates)[1], -0.05, rtol=1e-6)


def test_bfloat16_moments_are_stored_and_close():
    def run(dtype):
        optimizer, p = adamw(OptimConfig(lr=0.1, warmup_steps=0), dtype), params()
        state = optimizer.init(p)
        for t in range(5):
            updates, state = optimizer.update(jax.tree.map(jnp.cos, jax.tree.map(partial(jnp.add, t), p)), state, p)
            p = optax.apply_updates(p, updates)
        return p, {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim}

    exact, kinds = run("float32")
    assert kinds == {jnp.dtype("float32")}
    rounded, kinds = run("bfloat16")
    assert kinds == {jnp.dtype("bfloat16")}
    np.testing.assert_allclose(rounded["w"][...], exact["w"][...], rtol=2e-2)
