"""What the loop says of a step, when it saves, and when it stops: by hand."""

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import pytest

from dsv3_jax.config import load_config
from dsv3_jax.data.batch import Batch
from dsv3_jax.errors import UserError
from dsv3_jax.model.layout import Traffic
from dsv3_jax.training import context
from dsv3_jax.training.context import SaveClock
from dsv3_jax.training.loop import _check_health, _row
from dsv3_jax.training.objective import Metrics
from dsv3_jax.training.step import StepMetrics, batch_checksum
from tests.conftest import ROOT

TINY = ROOT / "configs" / "tiny.yaml"


def metrics(cross_entropy: float = 2.0, grad_norm: float = 0.5, loss: float = 2.5) -> StepMetrics:
    objective = Metrics(*map(jnp.float32, (loss, cross_entropy, 0.25, 3.0, 1.5)), Traffic(jnp.float32(32), jnp.float32(8)), ())
    return StepMetrics(objective, jnp.float32(grad_norm), jnp.float32(1e-3), jnp.float32(1.25), {}, jnp.uint32(7))


def test_a_row_of_metrics():
    config = load_config(TINY, ["data.batch_size=4", "data.seq_len=8"])
    row = _row(config, 3, metrics(), 0.5)
    assert (row["step"], row["tokens"], row["tokens_per_s"], row["step_time_s"]) == (3, 96, 64, 0.5)
    assert (row["copies_to_ranks"], row["copies_to_nodes"]) == (1, 0.25)
    assert (row["loss"], row["cross_entropy"], row["accuracy"], row["max_load"]) == (2.5, 2.0, 0.25, 1.25)
    assert (row["mtp_cross_entropy"], row["balance_loss"], row["grad_norm"], row["batch_checksum"]) == (3.0, 1.5, 0.5, 7)


def test_checkpoints_are_due_by_steps_and_by_minutes(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(context.time, "monotonic", lambda: now[0])
    by_step = SaveClock(load_config(TINY, ["checkpoint.every_steps=4"]).checkpoint)
    assert [step for step in range(1, 10) if by_step.due(step)] == [4, 8]
    by_time = SaveClock(load_config(TINY, ["checkpoint.every_minutes=2"]).checkpoint)
    now[0] += 119
    assert not by_time.due(1)
    now[0] += 1
    assert by_time.due(1)
    by_time.saved()
    assert not by_time.due(2)


@pytest.mark.parametrize(
    ("bad", "said"),
    [({"cross_entropy": 9.3}, "9.3"), ({"grad_norm": float("nan")}, "nan"), ({"loss": float("inf")}, "step 5")],
)
def test_a_run_is_stopped_at_twice_the_loss_of_guessing(bad, said):
    """A guess among 100 tokens costs ln 100 = 4.605."""
    config = load_config(TINY, ["model.vocab_size=100", "data.batch_size=2"])
    source: Any = SimpleNamespace(document_ids=lambda window: [f"document {window}"])
    manager: Any = SimpleNamespace(wait=lambda: None, latest=lambda: 4)
    _check_health(config, source, 5, metrics(cross_entropy=9.2), manager)
    with pytest.raises(UserError) as error:
        _check_health(config, source, 5, metrics(**bad), manager)
    text = str(error.value)
    assert said in text
    assert "diverged at step 5" in text
    assert "document 8, document 9;" in text  # the windows of the fifth batch of 2
    assert "last good checkpoint: step 4" in text


def test_the_checksum_knows_every_place():
    def of(tokens, segments) -> int:
        return int(batch_checksum(Batch(jnp.asarray(tokens), jnp.asarray(segments))))

    tokens, segments = [[1, 2, 3], [4, 5, 6]], [[0, 0, 1], [0, 0, 0]]
    changed = [
        of(tokens, segments), of(tokens[::-1], segments[::-1]), of([[1, 3, 2], [4, 5, 6]], segments),
        of(tokens, [[0, 1, 1], [0, 0, 0]]), of([[2, 2, 3], [4, 5, 6]], segments),
    ]  # fmt: skip
    assert len(set(changed)) == len(changed)
    assert of(tokens, segments) == of(tokens, segments)
