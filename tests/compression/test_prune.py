"""Pruning experts: which go, that routing stays legal, and that the refit is the least-squares solution."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.compression.features import DownWeights, correlations, down_weights, moe_features, outputs
from dsv3_jax.compression.prune import PruneConfig, kept_experts, prune_layer, pruned_config, without_experts
from dsv3_jax.compression.refit import refit
from dsv3_jax.compression.saliency import (
    SALIENCIES,
    Evidence,
    evidence,
    keep_two_of_four,
    magnitude,
    most_salient,
    wanda,
)
from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import UserError
from dsv3_jax.model.layout import Layout
from dsv3_jax.model.transformer import Block
from dsv3_jax.precision.recipes import RECIPES

CONFIG = ModelConfig(
    hidden_size=24, moe_intermediate_size=8, num_attention_heads=2, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8,
    qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=12, n_group=3, topk_group=2, num_experts_per_tok=3,
    initializer_range=0.3,
)  # fmt: skip
T = 200
REAL = np.arange(T) < 190  # the rest is padding


@pytest.fixture(scope="module")
def block() -> Block:
    found = Block(CONFIG, True, Layout(), RECIPES["float32"], nnx.Rngs(0))
    found.ffn.router.bias_E.set_value(jnp.asarray(np.random.default_rng(1).normal(0, 0.02, 12), jnp.float32))
    return found


@pytest.fixture(scope="module")
def x_TD() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(T, 24)).astype(np.float32)


def routing(moe, x_TD):
    """Choices and weights of each token, and the hidden activation of any expert, in float64."""
    expert_BLK, weight_BLK = moe.router.choose(moe.router.scores(jnp.asarray(x_TD)[None]))
    w = np.asarray(moe.w_gate_up_ED2M[...], np.float64)

    def hidden(t, e):
        gate, up = (x_TD[t].astype(np.float64) @ w[e, :, i] for i in (0, 1))
        return gate / (1 + np.exp(-gate)) * up

    return np.asarray(expert_BLK[0]), np.asarray(weight_BLK[0], np.float64), hidden


def dense_features(moe, x_TD) -> np.ndarray:
    """f64[T, E M + S]: F as one matrix, filled token by token."""
    experts, weights, hidden = routing(moe, x_TD)
    E, M = moe.config.n_routed_experts, moe.config.moe_intermediate_size
    found = np.zeros((T, E * M + M))
    w = np.asarray(moe.shared.w_gate_up_D2F[...], np.float64)
    for t in np.flatnonzero(REAL):
        for e, weight in zip(experts[t], weights[t], strict=True):
            found[t, e * M : (e + 1) * M] = weight * hidden(t, e)
        gate, up = (x_TD[t].astype(np.float64) @ w[:, i] for i in (0, 1))
        found[t, E * M :] = gate / (1 + np.exp(-gate)) * up
    return found


def test_features_give_the_layers_output(block, x_TD):
    features = moe_features(block.ffn, jnp.asarray(x_TD), REAL)
    expected = np.asarray(block.ffn(jnp.asarray(x_TD)[None], jnp.ones((1, T), bool))[0][0])
    found = np.asarray(outputs(features, down_weights(block.ffn)))
    np.testing.assert_allclose(found[REAL], expected[REAL], atol=1e-5)  # sums in another order
    assert not found[~REAL].any()


def test_evidence_is_counted_token_by_token(block, x_TD):
    features = moe_features(block.ffn, jnp.asarray(x_TD), REAL)
    found = evidence(features.routed, block.ffn.w_down_EMD[...], T)
    experts, weights, hidden = routing(block.ffn, x_TD)
    down = np.asarray(block.ffn.w_down_EMD[...], np.float64)
    tokens, output = np.zeros(12), np.zeros(12)
    for t in np.flatnonzero(REAL):
        for e, weight in zip(experts[t], weights[t], strict=True):
            tokens[e] += 1
            output[e] += weight * np.linalg.norm(hidden(t, e) @ down[e])
    np.testing.assert_array_equal(found.tokens_E, tokens)
    np.testing.assert_allclose(found.output_E, output, rtol=1e-5)


def test_saliencies_by_hand():
    seen = Evidence(jnp.asarray([4.0, 0.0, 1.0, 2.0]), jnp.asarray([2.0, 0.0, 3.0, 3.5]))
    scores = {name: score(seen).tolist() for name, score in SALIENCIES.items()}
    assert scores == {"use": [4, 0, 1, 2], "sum": [2, 0, 3, 3.5], "reap": [0.5, 0, 3, 1.75]}
    # two of each group of four, whatever the other group has; of equals the first
    assert most_salient(jnp.asarray([1.0, 9, 2, 3, 0, 0, 0, 0.1]), 2, 4).tolist() == [1, 3, 4, 7]


def test_scores_of_single_weights_by_hand():
    w = jnp.asarray([[1.0], [-2.0], [3.0], [0.5]])
    assert keep_two_of_four(magnitude(w, jnp.ones(4))).reshape(-1).tolist() == [False, True, True, False]
    # the first input is twenty times as large as the others
    assert keep_two_of_four(wanda(w, jnp.asarray([400.0, 1, 1, 1]))).reshape(-1).tolist() == [True, False, True, False]


@pytest.mark.parametrize("ridge", [0.01, 0.1])
def test_refit_solves_the_ridge_regression(block, x_TD, ridge):
    """Against float64's dense normal equations. Conjugate gradients stop at 1e-4 of the right-hand side."""
    features = moe_features(block.ffn, jnp.asarray(x_TD), REAL)
    lacking = np.random.default_rng(2).normal(size=(T, 24)) * REAL[:, None]
    f = dense_features(block.ffn, x_TD)
    gram = f.T @ f
    strength = ridge * np.diagonal(gram).mean()
    expected = np.linalg.solve(gram + strength * np.eye(len(gram)), f.T @ lacking)
    found = refit(features, jnp.asarray(lacking, jnp.float32), ridge)
    found = np.concatenate([np.asarray(found.routed_EMD).reshape(-1, 24), np.asarray(found.shared_SD)])
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())


def test_correlations_are_the_transpose_of_outputs(block, x_TD):
    features = moe_features(block.ffn, jnp.asarray(x_TD), REAL)
    random = np.random.default_rng(3)
    shapes = down_weights(block.ffn)
    weights = DownWeights(*(jnp.asarray(random.normal(size=a.shape), jnp.float32) for a in shapes))
    r_TD = jnp.asarray(random.normal(size=(T, 24)), jnp.float32)
    there = float(jnp.vdot(outputs(features, weights), r_TD))
    back = sum(float(jnp.vdot(a, b)) for a, b in zip(weights, correlations(features, r_TD), strict=True))
    assert there == pytest.approx(back, rel=1e-4)


def test_experts_that_nobody_chose_leave_no_trace(block, x_TD):
    """One of each group is never chosen, and goes: the output stays, so that columns, bias and weights were cut alike."""
    unused = np.asarray([1, 6, 11])
    idle = nnx.clone(block)
    idle.ffn.router.bias_E.set_value(block.ffn.router.bias_E[...].at[unused].set(-9.0))
    pruned, report = prune_layer(idle, 9, PruneConfig(saliency="use", ridge=None), x_TD, x_TD, REAL)
    assert report["kept"] == [e for e in range(12) if e not in unused]
    assert sum(report["tokens"]) == 3 * REAL.sum()
    assert report["lacking"][0] < 1e-10
    before, after = (b.ffn(jnp.asarray(x_TD)[None], jnp.ones((1, T), bool))[0] for b in (idle, pruned))
    np.testing.assert_allclose(after, before, atol=1e-5)
    assert pruned.ffn.w_gate_up_ED2M.shape[0] == pruned.ffn.router.bias_E.shape[0] == 9


@pytest.mark.parametrize("rounds", [1, 2])
def test_refit_brings_the_stream_back(block, x_TD, rounds):
    """Towards the original's, though what enters is no longer that; the block given stays as it was."""
    current = x_TD + 0.1 * np.random.default_rng(4).normal(size=x_TD.shape).astype(np.float32)
    held = np.asarray(block.ffn.w_down_EMD[...])
    settings = PruneConfig(ridge=0.01, rounds=rounds)
    pruned, report = prune_layer(block, 6, settings, jnp.asarray(x_TD), jnp.asarray(current), REAL)
    before, after = report["lacking"]
    assert after < 0.7 * before
    assert len(report["kept"]) == 6
    np.testing.assert_array_equal(block.ffn.w_down_EMD[...], held)
    wanted = x_TD + np.asarray(block.ffn(block.ffn_norm(jnp.asarray(x_TD))[None], jnp.ones((1, T), bool))[0][0])
    found = current + np.asarray(pruned.ffn(pruned.ffn_norm(jnp.asarray(current))[None], jnp.ones((1, T), bool))[0][0])
    missing, all_of_it = (np.square(a[REAL]).sum() for a in (wanted - found, wanted - current))
    assert missing / all_of_it == pytest.approx(after, rel=1e-3)


def test_pruned_blocks_keep_what_they_do_not_lose(block):
    pruned = without_experts(block, np.asarray([0, 3, 5, 6, 8, 11]))
    np.testing.assert_array_equal(pruned.ffn.w_gate_up_ED2M[...][2], block.ffn.w_gate_up_ED2M[...][5])
    np.testing.assert_array_equal(pruned.ffn.router.w_DE[...][:, 4], block.ffn.router.w_DE[...][:, 8])
    assert pruned.ffn.router.config.n_routed_experts == 6
    assert block.ffn.router.config.n_routed_experts == 12


@pytest.mark.parametrize(("fraction", "experts"), [(0, 12), (0.25, 9), (0.5, 6)])
def test_kept_experts_are_a_legal_model(fraction, experts):
    assert kept_experts(CONFIG, fraction) == experts
    assert pruned_config(CONFIG, experts).n_routed_experts == experts  # which the configuration checks


@pytest.mark.parametrize("fraction", [0.3, 0.75, 0.9])
def test_illegal_fractions_are_refused(fraction):
    with pytest.raises(UserError, match=rf"prune.fraction={fraction:g} leaves .* of the 4 experts.*multiple of 0.25 up to 0.5"):
        kept_experts(CONFIG, fraction)
