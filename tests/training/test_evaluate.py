"""Evaluation: sums over whole documents, what is made of them, and loss and accuracy by hand."""

import math
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.data.batch import Batch
from dsv3_jax.data.store import TokenStore
from dsv3_jax.model.layout import Layout
from dsv3_jax.state.train_state import new_state
from dsv3_jax.training.evaluate import Evaluation, evaluate_store
from dsv3_jax.training.objective import LossWeights, Share, head_objective
from dsv3_jax.training.step import make_eval_step
from tests.parallel.cases import WITHOUT_MTP, config_of


def test_what_is_made_of_the_sums():
    found = Evaluation(nll=6.0, correct=3.0, tokens=4.0, load=[np.array([[2.0, 2.0], [1.0, 3.0]]), np.array([4.0, 0.0])])
    assert found.loss == 1.5
    assert found.perplexity == pytest.approx(4.4816891)  # e^1.5
    assert found.accuracy == 0.75
    assert found.max_load == 2
    assert found.bits_per_byte(8) == pytest.approx(6 / math.log(2) / 8)


def test_every_target_of_every_document_counts_once():
    """Documents of 4 and 5 tokens hold 3 and 4 targets; windows of 2 make 4, in batches of 3 of which the last is filled up."""
    store = TokenStore(np.arange(9, dtype=np.int32), np.array([0, 4, 9]), ["a", "b"], np.array([4, 5]))
    batches = []

    def eval_step(_params, _router_bias, batch):
        batches.append(batch)
        count = float(batch.target_counts(0)[0])
        return 2 * count, count / 2, count, (np.array([count, 0.0]),)

    found = evaluate_store(eval_step, None, None, store, seq_len=2, batch_size=3)
    assert [batch.tokens.shape for batch in batches] == [(3, 3), (3, 3)]
    assert (found.nll, found.correct, found.tokens) == (14, 3.5, 7)
    assert [a.tolist() for a in found.load] == [[7, 0]]
    assert (found.loss, found.accuracy) == (2, 0.5)
    assert evaluate_store(eval_step, None, None, store, seq_len=2, batch_size=3, limit=1).tokens == 5


def test_the_load_is_that_of_the_text_whatever_the_batch():
    """27 tokens make 4 windows of 8, of which the last has 3 tokens; a batch of 3 leaves 2 rows without any text."""
    config = config_of(["train.grad_accum_steps=1", "model.num_hidden_layers=2", WITHOUT_MTP, "precision.recipe=float32"])
    K, state = config.model.num_experts_per_tok, new_state(config)
    store = TokenStore(np.arange(27, dtype=np.int32), np.array([0, 11, 27]), ["a", "b"], np.array([11, 16]))
    eval_step = make_eval_step(config)
    one, three = (evaluate_store(eval_step, state.params, state.router_bias, store, 8, rows) for rows in (1, 3))
    assert [float(a.sum()) for a in one.load] == [27 * K]
    np.testing.assert_array_equal(one.load[0], three.load[0])
    assert one.max_load == three.max_load > 1
    assert one.tokens == three.tokens == 25


def test_cross_entropy_and_accuracy_by_hand():
    """Probabilities of 3/4 and 1/4. Of four places two have a target in their document: one likely token, one unlikely."""
    head_DV = jnp.asarray([[math.log(3), 0.0], [0.0, 0.0]])
    model = SimpleNamespace(layout=Layout(), head_weight=lambda: head_DV, core="auto", mtp=[])
    hidden_BLD = jnp.tile(jnp.asarray([1.0, 0.0]), (1, 4, 1))
    batch = Batch(jnp.asarray([[1, 0, 1, 1, 0]]), jnp.asarray([[0, 0, 0, 1, -1]]))
    share = Share(LossWeights(0.0, 0.0), batch.target_counts(0), 1)
    assert float(share.counts[0]) == 2
    loss, metrics = head_objective(model, hidden_BLD, [], batch, share)
    assert float(loss) == pytest.approx((math.log(4 / 3) + math.log(4)) / 2)
    assert float(metrics.cross_entropy) == pytest.approx(float(loss))
    assert float(metrics.accuracy) == 0.5
