"""The model's own promises: causality, segments, routing, balance, MTP, compile-time and remat."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dsv3_jax.config import ModelConfig
from dsv3_jax.data.batch import Batch
from dsv3_jax.model.layout import Layout
from dsv3_jax.model.moe import MoE, sequence_balance_loss
from dsv3_jax.model.parameters import RouterBias
from dsv3_jax.model.transformer import Transformer, positions
from dsv3_jax.precision.recipes import RECIPES
from dsv3_jax.training.objective import LossWeights, Share, objective

MICRO = ModelConfig(
    vocab_size=61, hidden_size=24, intermediate_size=40, moe_intermediate_size=12, num_hidden_layers=3,
    num_attention_heads=2, q_lora_rank=10, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5,
    n_routed_experts=8, num_experts_per_tok=3, num_nextn_predict_layers=2, initializer_range=0.2,
)  # fmt: skip


def make(config: ModelConfig = MICRO, **options) -> Transformer:
    return nnx.jit(lambda: Transformer(config, rngs=nnx.Rngs(0), **options))()


def tokens(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), shape, 0, MICRO.vocab_size)


def test_later_tokens_change_nothing_earlier():
    model, ids = make(), tokens(2, 20)
    before, after = model(ids), model(ids.at[:, 12].set(0))
    np.testing.assert_allclose(before[:, :12], after[:, :12], atol=1e-5)
    assert jnp.abs(before[:, 12:] - after[:, 12:]).max() > 1e-2


def test_packed_documents_equal_separate_ones():
    """Hidden states of a packed row are those of its documents alone: attention and positions respect boundaries."""
    model, ids = make(), tokens(1, 31)
    segment_BL = jnp.asarray([[0] * 9 + [1] * 15 + [2] * 7])
    packed, _ = jax.jit(lambda i, s: model.hidden(i, s))(ids, segment_BL)
    np.testing.assert_allclose(jnp.square(packed).mean(-1), 1, rtol=1e-4)  # after the final norm: for the head and for MTP
    for start, end in ((0, 9), (9, 24), (24, 31)):
        alone, _ = model.hidden(ids[:, start:end], jnp.zeros((1, end - start), jnp.int32))
        np.testing.assert_allclose(packed[:, start:end], alone, atol=2e-5)


def test_positions_count_within_segments():
    assert positions(jnp.asarray([[3, 3, 4, 4, 4, 7]])).tolist() == [[0, 1, 0, 1, 2, 0]]


def test_balance_loss_by_hand():
    """Even routing gives 1; one sequence whose tokens all prefer the same experts approaches E / K."""
    E, K = 4, 2
    even = jnp.tile(jnp.asarray([[0.9, 0.9, 0.1, 0.1], [0.1, 0.1, 0.9, 0.9]]), (3, 1))[None]
    assert float(sequence_balance_loss(even, jax.lax.top_k(even, K)[1])) == pytest.approx(1.0)
    hot = jnp.tile(jnp.asarray([[1.0, 1.0, 0.0, 0.0]]), (6, 1))[None]
    assert float(sequence_balance_loss(hot, jax.lax.top_k(hot, K)[1])) == pytest.approx(E / K)


def test_the_balance_loss_is_over_choices_without_the_bias():
    """One expert a token, of scores sigmoid(2, 1, 0, -1). The bias sends all to the last; the loss stays the first one's."""
    config = dataclasses.replace(
        MICRO, hidden_size=2, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=1, moe_intermediate_size=2
    )
    moe = MoE(config, Layout(), RECIPES["float32"], nnx.Rngs(0))
    moe.router.w_DE[...] = jnp.asarray([[2.0, 1.0, 0.0, -1.0], [0.0] * 4])
    moe.router.bias_E[...] = jnp.asarray([0.0, 0.0, 0.0, 10.0])
    _, stats = moe(jnp.tile(jnp.asarray([1.0, 0.0]), (1, 3, 1)), jnp.ones((1, 3), bool))
    np.testing.assert_array_equal(stats.load_E, [0, 0, 0, 3])
    score = [0.880797, 0.731059, 0.5, 0.268941]
    assert float(stats.balance_loss) == pytest.approx(4 * score[0] / sum(score), rel=1e-5)
    _, padded = moe(jnp.tile(jnp.asarray([1.0, 0.0]), (1, 3, 1)), jnp.asarray([[True, True, False]]))
    np.testing.assert_array_equal(padded.load_E, [0, 0, 0, 2])  # padding is no expert's token


def loss_of(model: Transformer, ids, segments, mtp=1.0):
    batch = Batch(ids, segments)
    counts = batch.target_counts(len(model.mtp))
    return objective(model, batch, Share(LossWeights(mtp, 1e-3), counts, ids.shape[0]))


def test_mtp_targets_are_further_ahead():
    """With depth 2, the last lookahead token is only a target of the second module; changing it moves only its loss."""
    model, ids = make(), tokens(2, 12 + 3)
    segments = jnp.zeros_like(ids)
    run = jax.jit(lambda ids: loss_of(model, ids, segments)[1])
    before, after = run(ids), run(ids.at[:, -1].add(1))
    assert float(before.cross_entropy) == float(after.cross_entropy)
    assert float(before.mtp_cross_entropy) != float(after.mtp_cross_entropy)
    assert [tuple(load.shape) for load in before.load] == [(2, 8), (1, 8), (1, 8)]
    assert all(float(load.sum()) == load.shape[0] * 2 * 12 * 3 for load in before.load)


def test_targets_of_other_documents_do_not_count():
    segments = jnp.asarray([[0, 0, 0, 1, 1, -1, -1]])
    assert [float(c) for c in Batch(segments, segments).target_counts(1)] == [3.0, 1.0]


@functools.cache
def gradients_under(remat: str):
    ids = tokens(2, 18)
    model = make(dataclasses.replace(MICRO, num_nextn_predict_layers=1), remat=remat)
    graph, params, bias = nnx.split(model, nnx.Param, RouterBias)
    return jax.jit(jax.grad(lambda p: loss_of(nnx.merge(graph, p, bias), ids, jnp.zeros_like(ids))[0]))(params)


@pytest.mark.parametrize("remat", ["selective", "full", "offload", "sqrt"])
def test_remat_changes_no_gradient(remat):
    for ours, theirs in zip(jax.tree.leaves(gradients_under(remat)), jax.tree.leaves(gradients_under("none")), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_layers_that_are_not_live_change_nothing():
    """As a pipeline's pieces have, that hold a layer less than others."""
    model, segment_BL = make(), jnp.zeros((1, 4), jnp.int32)
    x_BLD = jax.random.normal(jax.random.key(0), (1, 4, MICRO.hidden_size))
    run = jax.jit(lambda live_N: model.run(model.moe_blocks, x_BLD, segment_BL, live_N)[0])
    np.testing.assert_array_equal(run(jnp.asarray([False, False])), x_BLD)
    assert not np.allclose(run(jnp.asarray([True, False])), run(jnp.asarray([True, True])))
    np.testing.assert_allclose(run(jnp.asarray([True, True])), model.run(model.moe_blocks, x_BLD, segment_BL)[0], rtol=1e-6)


def test_gradients_against_finite_differences():
    """The whole loss, custom gradients included, along the gradient itself (float32: 1% is rounding).

    Every token takes every expert, because a changed choice would be a jump that no gradient shows.
    """
    ids = tokens(2, 19)
    smooth = {"n_routed_experts": 4, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1}
    config = dataclasses.replace(MICRO, initializer_range=0.1, num_nextn_predict_layers=1, **smooth)
    graph, params, bias = nnx.split(make(config), nnx.Param, RouterBias)

    @jax.jit
    def f(p):
        return loss_of(nnx.merge(graph, p, bias), ids, jnp.zeros_like(ids))[0]

    eps = 2e-3

    @jax.jit  # by themselves, operations on each tensor would be a hundred programs
    def along_the_gradient(p):
        gradient = jax.grad(f)(p)
        norm = optax.global_norm(gradient)
        move = jax.tree.map(lambda g: eps * g / norm, gradient)
        return norm, jax.tree.map(jnp.add, p, move), jax.tree.map(jnp.subtract, p, move)

    norm, further, back = along_the_gradient(params)
    up, down = f(further), f(back)
    assert float(up - down) / (2 * eps) == pytest.approx(float(norm), rel=1e-2)


def test_program_does_not_grow_with_depth():
    def program(layers: int) -> str:
        config = dataclasses.replace(MICRO, num_hidden_layers=layers, num_nextn_predict_layers=0)
        graph, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
        shape = jax.ShapeDtypeStruct((1, 16), jnp.int32)
        return jax.jit(lambda s, t: nnx.merge(graph, s)(t)).lower(state, shape).as_text()

    assert len(program(30).splitlines()) == len(program(6).splitlines())


def test_bfloat16_stays_close():
    ids = tokens(1, 16)
    exact, rounded = make()(ids), make(recipe=RECIPES["bf16"])(ids)
    assert rounded.dtype == jnp.float32
    cosine = jnp.vdot(exact, rounded) / (jnp.linalg.norm(exact) * jnp.linalg.norm(rounded))
    assert float(cosine) > 0.99  # near-ties in routing may fall the other way
