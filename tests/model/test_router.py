"""Routers: DeepSeek-V3's against sorting and by hand, and another one through the contract."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.model import moe
from dsv3_jax.model.layers import linear
from dsv3_jax.model.layout import Layout
from dsv3_jax.model.parameters import ROUTER, weight
from dsv3_jax.model.router import Router, SigmoidRouter
from dsv3_jax.parallel.layout import layout_for
from dsv3_jax.state.train_state import abstract_state
from dsv3_jax.training.resolve import abstract_batch
from dsv3_jax.training.step import make_train_step
from tests.model.test_model import MICRO
from tests.parallel.cases import config_of


def naive_choice(score, bias, config):
    """Group-limited top-k for one token, by sorting."""
    biased = score + bias
    groups = biased.reshape(config.n_group, -1)
    best = np.argsort(-np.sort(groups, axis=1)[:, -2:].sum(1), kind="stable")[: config.topk_group]
    allowed = np.full_like(biased, -np.inf).reshape(groups.shape)
    allowed[best] = groups[best]
    chosen = np.argsort(-allowed.reshape(-1), kind="stable")[: config.num_experts_per_tok]
    weight = score[chosen] / score[chosen].sum() if config.norm_topk_prob else score[chosen]
    return set(chosen.tolist()), weight.sum() * config.routed_scaling_factor


@pytest.mark.parametrize("changes", [{}, {"n_group": 1, "topk_group": 1}, {"norm_topk_prob": False}, {"topk_group": 4}])
def test_router_against_sorting(changes):
    config = dataclasses.replace(MICRO, **changes)
    router = SigmoidRouter(config, Layout(), nnx.Rngs(0))
    router.bias_E[...] = jax.random.normal(jax.random.key(1), (8,)) * 0.3
    score_TE = jax.nn.sigmoid(jax.random.normal(jax.random.key(2), (50, 8)))
    expert_TK, weight_TK = (a[0] for a in router.choose(score_TE[None]))
    for t in range(50):
        chosen, total = naive_choice(np.asarray(score_TE[t]), np.asarray(router.bias_E[...]), config)
        assert set(expert_TK[t].tolist()) == chosen
        assert float(weight_TK[t].sum()) == pytest.approx(total, rel=1e-5)


def test_router_bias_gets_no_gradient_and_changes_no_weight():
    router = SigmoidRouter(MICRO, Layout(), nnx.Rngs(0))
    score_TE = jax.nn.sigmoid(jax.random.normal(jax.random.key(2), (20, 8)))
    before_TK, weight_TK = (a[0] for a in router.choose(score_TE[None]))
    router.bias_E[...] = router.bias_E[...] + 5.0  # the same for all: choices stay, and so must their weights
    after_TK, weight_after_TK = (a[0] for a in router.choose(score_TE[None]))
    np.testing.assert_array_equal(jnp.sort(before_TK), jnp.sort(after_TK))
    np.testing.assert_allclose(jnp.sort(weight_TK), jnp.sort(weight_after_TK), rtol=1e-6)


def test_bias_moves_towards_the_idle_experts():
    router = SigmoidRouter(dataclasses.replace(MICRO, n_routed_experts=4, n_group=1, topk_group=1), Layout(), nnx.Rngs(0))
    router.bias_E.set_value(jnp.zeros((2, 4)))  # of two stacked layers
    router.after_step(jnp.asarray([[4.0, 2, 1, 1], [2, 2, 2, 2]]), speed=0.01)
    np.testing.assert_allclose(router.bias_E[...], [[-0.01, 0, 0.01, 0.01], [0, 0, 0, 0]], atol=1e-9)


class SoftmaxRouter(Router):
    """Top-k of softmax affinities, which are the weights: no bias, nothing to do after a step."""

    def __init__(self, config, layout, rngs):
        self.config, self.layout = config, layout
        self.w_DE = weight(rngs, config.initializer_range, ROUTER, embed=config.hidden_size, scores=config.n_routed_experts)

    def scores(self, x_BLD):
        return jax.nn.softmax(linear(x_BLD.astype(jnp.float32), self.w_DE[...]))

    def choose(self, score_BLE):
        K = self.config.num_experts_per_tok
        expert_BLK = self.layout.tokenwise(lambda s: jax.lax.top_k(s, K)[1], jax.lax.stop_gradient(score_BLE))
        return expert_BLK, jnp.take_along_axis(score_BLE, expert_BLK, axis=-1)


@pytest.mark.parametrize("mesh", [["parallel.data=1"], ["parallel.pipe=2", "parallel.fsdp=2"]])
def test_a_router_that_keeps_nothing(mesh, monkeypatch):
    monkeypatch.setattr(moe, "make_router", SoftmaxRouter)
    config = config_of(mesh)
    layout = layout_for(config, jax.devices()[: 4 if len(mesh) > 1 else 1])
    state = abstract_state(config, layout)
    assert not jax.tree.leaves(state.router_bias)
    after, _ = jax.eval_shape(make_train_step(config, layout), state, abstract_batch(config, layout))
    assert jax.tree.structure(after) == jax.tree.structure(state)
