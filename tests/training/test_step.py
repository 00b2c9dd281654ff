"""The training step: it learns, accumulates exactly, balances, and compiles once."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dsv3_jax.config import load_config
from dsv3_jax.data.batch import Batch
from dsv3_jax.model.layout import Traffic
from dsv3_jax.model.names import variables_by_name
from dsv3_jax.model.parameters import HEAD
from dsv3_jax.optim.registry import optimizer_of
from dsv3_jax.precision.recipes import recipe_of
from dsv3_jax.state.train_state import TrainState, abstract_model, new_state
from dsv3_jax.training.objective import Metrics
from dsv3_jax.training.step import after_step, apply_gradients, make_train_step

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


def batch_of(config, seed=0):
    random = np.random.default_rng(seed)
    shape = (config.data.batch_size, config.data.seq_len + 1 + config.model.num_nextn_predict_layers)
    segments = np.sort(random.integers(0, 3, shape).astype(np.int32), axis=1)
    return Batch(random.integers(0, config.model.vocab_size, shape).astype(np.int32), segments)


def run(overrides, steps):
    config = load_config(TINY, overrides)
    state, step = new_state(config), make_train_step(config)
    rows = []
    for _ in range(steps):
        state, metrics = step(state, batch_of(config))
        rows.append(jax.device_get(metrics))
    assert step._cache_size() == 1
    return state, rows


MTP = "model.num_nextn_predict_layers=1"


@pytest.fixture(scope="module")
def learned(micro_overrides_in, tmp_path_factory):
    """What 80 steps on one batch report; MTP's weight changes at the third, and no other loss is added."""
    options = [MTP, "optim.lr=1e-2", "train.mtp_switch_step=2", "train.sequence_balance_alpha=0"]
    return run([*micro_overrides_in(tmp_path_factory.mktemp("learned")), *options], 80)[1]


def test_overfits_one_batch(learned):
    assert float(learned[0].objective.cross_entropy) == pytest.approx(np.log(300), rel=0.02)
    assert float(learned[-1].objective.cross_entropy) < 1.0
    assert float(learned[-1].objective.mtp_cross_entropy) < 2.0


def test_mtp_weight_switches_without_recompilation(learned):
    losses = [row.objective for row in learned[:4]]
    weights = [(float(o.loss) - float(o.cross_entropy)) / float(o.mtp_cross_entropy) for o in losses]
    np.testing.assert_allclose(weights, [0.3, 0.3, 0.1, 0.1], rtol=1e-3)


def test_accumulation_equals_the_whole_batch(micro_overrides):
    """The same loss, gradient norm and loads; parameters to rounding, which Adam's first steps blow up to its lr."""
    whole, a = run([*micro_overrides, MTP], 2)
    parts, b = run([*micro_overrides, MTP, "train.grad_accum_steps=4"], 2)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x.objective.loss, y.objective.loss, rtol=2e-5)
        np.testing.assert_allclose(x.grad_norm, y.grad_norm, rtol=1e-3)
    for x, y in zip(a[0].objective.load, b[0].objective.load, strict=True):
        np.testing.assert_array_equal(x, y)
    for x, y in zip(jax.tree.leaves(whole.router_bias), jax.tree.leaves(parts.router_bias), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


def test_options_learn_as_well(micro_overrides):
    """All at once: what any of them broke would not learn."""
    options = ["precision.recipe=bf16", "optim.moment_dtype=bfloat16", "remat.policy=full"]
    _, rows = run([*micro_overrides, "optim.lr=1e-2", *options], 40)
    assert float(rows[-1].objective.cross_entropy) < 3.5


# two stacked MoE layers of two experts, and no MTP module
TWO_EXPERTS = (
    "model.n_routed_experts=2", "model.n_group=1", "model.topk_group=1", "model.num_experts_per_tok=1",
    "model.num_hidden_layers=3", "model.first_k_dense_replace=1", "model.num_nextn_predict_layers=0",
)  # fmt: skip


def no_bias(config):
    return jax.tree.map(lambda a: jnp.zeros(a.shape), abstract_model(config, recipe_of(config.precision)).router_bias)


@pytest.mark.parametrize(("clip_norm", "clipped"), [(1.0, [0.6, 0.8]), (10.0, [3.0, 4.0])])
def test_what_a_step_does_with_gradients_by_hand(clip_norm, clipped):
    """(3, 4) has norm 5; Adam's first moment is a tenth of what it is given."""
    config = load_config(TINY, [*TWO_EXPERTS, f"optim.clip_norm={clip_norm}", "optim.ema_decay=0.9", "optim.warmup_steps=10"])
    params, grads = (
        nnx.State({"w": nnx.Param(jnp.asarray([a]), logical_axes=("a", "b"), kind=HEAD)}) for a in ([1.0, 1.0], [3.0, 4.0])
    )
    before = TrainState(jnp.int32(4), params, nnx.State({}), optimizer_of(config).init(params), params, {})
    zero, load = jnp.float32(0), (jnp.asarray([[1.0, 3.0], [2.0, 2.0]]),)
    metrics = Metrics(zero, zero, zero, zero, zero, Traffic(zero, zero), load)
    bias = no_bias(config)
    state, found = apply_gradients(config, replace(before, router_bias=bias), grads, metrics, recipe_of(config.precision))
    assert float(found.grad_norm) == 5
    assert float(found.lr) == pytest.approx(config.optim.lr * 0.5)  # the fifth of ten steps of warm-up
    assert float(found.max_load) == 1.5
    assert int(state.step) == 5
    (new,), (average,) = jax.tree.leaves(state.params), jax.tree.leaves(state.ema)
    np.testing.assert_allclose(average, 0.9 + 0.1 * new, rtol=1e-6)
    (first,) = jax.tree.leaves(optax.tree.get(state.opt_state, "mu"))
    np.testing.assert_allclose(first, [[0.1 * g for g in clipped]], rtol=1e-6)


def test_ema_is_the_moving_average(micro_overrides):
    config = load_config(TINY, [*micro_overrides, "optim.ema_decay=0.9"])
    state, step = new_state(config), make_train_step(config)
    expected = jax.device_get(jax.tree.leaves(state.params))
    for i in range(3):
        state, _ = step(state, batch_of(config, i))
        leaves = jax.device_get(jax.tree.leaves(state.params))
        expected = [0.9 * e + 0.1 * p for e, p in zip(expected, leaves, strict=True)]
    for ours, theirs in zip(jax.tree.leaves(state.ema), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_each_router_sees_its_own_load():
    """The stacked layers' before the MTP modules', whatever the leaves' order."""
    config = load_config(TINY, [*TWO_EXPERTS, "model.num_nextn_predict_layers=2"])
    model, bias = abstract_model(config, recipe_of(config.precision)), no_bias(config)
    load = jnp.asarray([[3.0, 1.0], [2.0, 2.0]]), jnp.asarray([[1.0, 3.0]]), jnp.asarray([[2.0, 2.0]])
    after = {name: v.get_value().tolist() for name, v in variables_by_name(after_step(model, bias, load, 1.0)).items()}
    assert after == {
        "moe_blocks/ffn/router/bias_E": [[-1, 1], [0, 0]],
        "mtp/0/block/ffn/router/bias_E": [1, -1],
        "mtp/1/block/ffn/router/bias_E": [0, 0],
    }
