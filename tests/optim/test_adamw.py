"""The optimiser against its formulas, and the schedule at its corners."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.config import OptimConfig
from dsv3_jax.model.parameters import HEAD, NORM
from dsv3_jax.optim.adamw import adamw
from dsv3_jax.optim.optimizer import decays, learning_rate, round_at_random


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


@pytest.mark.parametrize(("beta2", "steps", "expected"), [(0.999, 5000, 0.01008), (0.99, 300, 0.0736), (0.95, 60, 0.0691)])
def test_second_moments_in_bfloat16_decay(beta2, steps, expected):
    """Without gradients 1.5 becomes 1.5 * beta2^steps; rounded to the nearest, 0.999 leaves it at 1.5."""
    optimizer = adamw(OptimConfig(beta2=beta2), "bfloat16")
    p = nnx.State({"w": nnx.Param(jnp.zeros((64, 64)), logical_axes=("a", "b"), kind=HEAD)})
    zeros = jax.tree.map(jnp.zeros_like, p)
    state = jax.tree.map(lambda a: jnp.full_like(a, 1.5) if a.ndim else a, optimizer.init(p))

    def step(state, _):
        return optimizer.update(zeros, state, p)[1], None

    (nu,) = jax.tree.leaves(optax.tree.get(jax.jit(lambda s: jax.lax.scan(step, s, None, steps)[0])(state), "nu"))
    assert nu.dtype == jnp.bfloat16
    # at random: 64^2 numbers that are each 10% off; to the nearest, 0.95 decays by 0.9505 to 0.9461 a step
    assert float(nu.astype(jnp.float32).mean()) == pytest.approx(expected, rel=0.02 if beta2 > 0.95 else 0.15)


def test_rounding_at_random_by_hand():
    """A quarter of the way from 1 to the next bfloat16, 1 + 2^-7: one number in four goes up. What it can store stays."""
    step = jnp.int32(7)
    found = round_at_random(jnp.full((128, 128), 1 + 2.0**-9), step, 0).astype(jnp.float32)
    assert set(np.unique(found).tolist()) == {1.0, 1 + 2.0**-7}
    assert float((found > 1).mean()) == pytest.approx(0.25, abs=0.01)
    exact = jnp.asarray([0.0, 1.0, -1.5, 2.0**-126, jnp.inf, -jnp.inf])
    np.testing.assert_array_equal(round_at_random(exact, step, 0).astype(jnp.float32), exact)
    odd_nan = jax.lax.bitcast_convert_type(jnp.full(64, 0x7FFFFFFF, jnp.uint32), jnp.float32)
    assert jnp.isnan(round_at_random(odd_nan, step, 0)).all()


def test_rounding_at_random_is_the_same_on_any_mesh():
    """And another one at another step, and for another array."""
    x = jax.random.normal(jax.random.key(0), (16, 24))
    run = jax.jit(round_at_random, static_argnums=2)
    one = run(x, jnp.int32(3), 1)
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    for spec in (PartitionSpec("a", "b"), PartitionSpec(None, "a"), PartitionSpec(("b", "a"))):
        sharded = jax.device_put(x, NamedSharding(mesh, spec))
        np.testing.assert_array_equal(run(sharded, jnp.int32(3), 1), one)
    for other in (run(x, jnp.int32(4), 1), run(x, jnp.int32(3), 2)):
        assert 0.2 < float((other != one).mean()) < 0.5


def test_bfloat16_moments_of_the_preset_are_rounded_to_the_nearest():
    """beta2 = 0.95 moves a moment by several of bfloat16's steps, and keeps the bits that it had."""
    optimizer, p = adamw(OptimConfig(lr=0.1, warmup_steps=0), "bfloat16"), params()
    grads = jax.tree.map(jnp.cos, p)
    _, state = optimizer.update(grads, optimizer.init(p), p)
    nu = optax.tree.get(state, "nu")["w"][...]
    np.testing.assert_array_equal(nu, ((1 - 0.95) * jnp.square(grads["w"][...])).astype(jnp.bfloat16))


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
