"""The training loss by hand: a stub in place of the model says what every module predicts."""

import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from dsv3_jax.data.batch import Batch
from dsv3_jax.model.layout import Layout, Traffic
from dsv3_jax.model.moe import RouterStats
from dsv3_jax.training.objective import LossWeights, Share, head_objective

V, L = 6, 3
TOKENS = jnp.arange(V)[None]  # 3 inputs, and what two MTP modules need beyond them


def predicting(token_BL: jax.Array) -> jax.Array:
    """Hidden states that give these tokens 5/10, and each of the other five 1/10."""
    return jax.nn.one_hot(token_BL, V)


def stats(*balance_loss: float) -> RouterStats:
    return RouterStats(jnp.ones((len(balance_loss), 4)), jnp.asarray(balance_loss), Traffic(jnp.ones(1), jnp.ones(1)))


class Stub(SimpleNamespace):
    """Its first MTP module is always right, its second always wrong."""

    layout, core, mtp = Layout(), "auto", (None, None)

    def head_weight(self) -> jax.Array:
        return math.log(5) * jnp.eye(V)

    def mtp_hidden(self, depth: int, hidden_BLD, ahead_BL, segment_BL):
        self.seen.append(ahead_BL.tolist())
        self.read.append(hidden_BLD)
        right = TOKENS[:, 2 : 2 + L]
        return predicting(right if depth == 0 else right - 2), stats(3.0)


def test_every_term_by_hand():
    model: Any = Stub(seen=[], read=[])
    batch = Batch(TOKENS, jnp.zeros_like(TOKENS))
    share = Share(LossWeights(0.3, 0.01), batch.target_counts(2), 2)  # this row is one of two sequences
    hidden_BLD = predicting(TOKENS[:, 1 : 1 + L])
    loss, metrics = head_objective(model, hidden_BLD, [stats(1.0, 2.0)], batch, share)
    assert model.read[0] is hidden_BLD  # what the head reads, normalised
    assert model.read[1].tolist() == predicting(TOKENS[:, 2 : 2 + L]).tolist()  # and what the first module hands to it
    assert model.seen == [[[1, 2, 3]], [[2, 3, 4]]]  # what the modules read beside the hidden states
    right, wrong = math.log(2), math.log(10)
    assert float(metrics.cross_entropy) == pytest.approx(right)
    assert float(metrics.accuracy) == 1
    assert float(metrics.mtp_cross_entropy) == pytest.approx((right + wrong) / 2)
    assert float(metrics.balance_loss) == pytest.approx((1 + 2 + 3 + 3) / 2)
    assert float(loss) == pytest.approx(right + 0.3 * (right + wrong) / 2 + 0.01 * 4.5)
    assert float(metrics.loss) == pytest.approx(float(loss))
    assert [a.shape for a in metrics.load] == [(2, 4), (1, 4), (1, 4)]
    assert float(metrics.traffic.to_ranks) == 3
