"""What measuring reports, against NumPy's own arithmetic on logits."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

from dsv3_jax.compression.measure import compare, ratio_of_sums
from dsv3_jax.config import ModelConfig
from dsv3_jax.data.batch import Batch
from dsv3_jax.model.transformer import Transformer

CONFIG = ModelConfig(
    vocab_size=40, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
    q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=8, n_group=2,
    topk_group=1, num_experts_per_tok=2, num_nextn_predict_layers=2, initializer_range=0.3,
)  # fmt: skip
L, DEPTH = 12, 2


def log_softmax(a):
    a = a - a.max(-1, keepdims=True)
    return a - np.log(np.exp(a).sum(-1, keepdims=True))


def drafts(model, tokens, segments):
    hidden, _ = model.hidden(jnp.asarray(tokens[:, :L]), jnp.asarray(segments[:, :L]))
    for k in range(DEPTH):
        ahead = jnp.asarray(tokens[:, k + 1 : k + 1 + L])
        hidden, _ = model.mtp_hidden(k, hidden, ahead, jnp.asarray(segments[:, :L]))
        yield np.asarray(hidden @ model.head_weight()).argmax(-1)


def test_comparison_agrees_with_numpy():
    """A window with two documents, one with padding, and one of padding alone, which is left out."""
    original, other = (Transformer(CONFIG, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    tokens = np.random.default_rng(0).integers(0, 40, (3, L + 1 + DEPTH)).astype(np.int32)
    segments = np.zeros_like(tokens)
    segments[0, 6:], segments[1, 8:], segments[2] = 1, -1, -1
    found = compare(original, {"other": other}, [Batch(tokens, segments)])["other"]
    assert found.targets.tolist() == [11, 7]  # the next token of the same document
    for row in (0, 1):
        p, q = (np.zeros((L, 40)), np.zeros((L, 40)))
        for model, into in ((original, p), (other, q)):
            hidden, _ = model.hidden(jnp.asarray(tokens[:, :L]), jnp.asarray(segments[:, :L]))
            into[:] = np.asarray(hidden @ model.head_weight(), np.float64)[row]
        live = [i for i in range(L) if segments[row, i] == segments[row, i + 1] >= 0]
        target = tokens[row, 1 : L + 1]
        lp, lq = log_softmax(p), log_softmax(q)
        assert found.nll[row] == pytest.approx(-sum(lq[i, target[i]] for i in live), rel=1e-5)
        assert found.original_nll[row] == pytest.approx(-sum(lp[i, target[i]] for i in live), rel=1e-5)
        assert found.kl[row] == pytest.approx(sum((np.exp(lp[i]) * (lp[i] - lq[i])).sum() for i in live), rel=1e-4)
        assert found.correct[row] == sum(q[i].argmax() == target[i] for i in live)
        assert found.agreed[row] == sum(q[i].argmax() == p[i].argmax() for i in live)
        for k, draft in enumerate(drafts(other, tokens, segments)):
            places = [i for i in range(L - k - 1) if segments[row, i] == segments[row, i + k + 2] >= 0]
            assert found.drafted[row, k] == len(places)
            assert found.accepted[row, k] == sum(draft[row, i] == q[i + k + 1].argmax() for i in places)


def test_a_model_beside_itself_has_changed_nothing():
    model = Transformer(CONFIG, rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(1).integers(0, 40, (4, L + 1 + DEPTH)).astype(np.int32)
    figures = compare(model, {"same": model}, [Batch(tokens, np.zeros_like(tokens))])["same"].figures()
    assert figures["kl"] == {"value": 0, "ci95": 0}
    assert figures["loss_change"]["value"] == figures["mtp_acceptance_change"][1]["value"] == 0
    assert figures["agreement"]["value"] == 1
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert figures["targets"] == 4 * L


def test_interval_of_equal_windows_is_students():
    """With windows of one size a ratio is a mean, whose interval SciPy has."""
    over = np.asarray([1.0, 3.0, 2.0, 5.0])
    found = ratio_of_sums(over, np.full(4, 2.0))
    low, high = stats.t.interval(0.95, 3, loc=(over / 2).mean(), scale=stats.sem(over / 2))
    assert found.value == pytest.approx((low + high) / 2)
    assert found.ci95 == pytest.approx((high - low) / 2)


def test_intervals_are_paired():
    """Windows differ tenfold; the models by one percent in each: no doubt about that."""
    original = np.asarray([1.0, 10.0, 3.0])
    assert ratio_of_sums(1.01 * original, original) == pytest.approx((1.01, 0.0), abs=1e-12)
