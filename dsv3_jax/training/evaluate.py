"""Evaluation: sums over complete documents, in which every token is a target exactly once."""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.checkpoint.load import Checkpoint, load_for_evaluation
from dsv3_jax.checkpoint.storage import read_metadata
from dsv3_jax.cluster.processes import is_first
from dsv3_jax.data.batch import Batch, stack
from dsv3_jax.data.batches import PackedWindows
from dsv3_jax.data.identity import identify
from dsv3_jax.data.store import TokenStore
from dsv3_jax.model.layout import Layout
from dsv3_jax.parallel.rows import place
from dsv3_jax.state.train_state import ONE_DEVICE
from dsv3_jax.training.step import make_eval_step


@dataclass(frozen=True)
class Evaluation:
    """Sums over the evaluated targets, and what follows from them."""

    nll: float  # nats
    correct: float
    tokens: float
    load: list[np.ndarray]  # tokens per expert, one f32[layers, E] or f32[E] per stack

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nll / max(self.tokens, 1)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))  # beyond, a float has no room

    @property
    def accuracy(self) -> float:
        return self.correct / max(self.tokens, 1)

    @property
    def max_load(self) -> float:
        """The busiest expert's load over the mean load, in the worst layer; 1 is perfect balance."""
        return max((float((a.max(-1) / a.mean(-1)).max()) for a in self.load), default=1.0)

    def bits_per_byte(self, text_bytes: int) -> float:
        """The nll in bits per byte of text; `text_bytes` is the size of the evaluated documents in UTF-8."""
        return self.nll / math.log(2) / text_bytes


def eval_batches(store: TokenStore, seq_len: int, batch_size: int, limit: int | None) -> Iterator[Batch]:
    """The documents in order, once; the last batch is filled up with padding. `limit` is a number of batches."""
    source = PackedWindows(store, seq_len, ahead=1, seed=0, shuffle=False)
    batches = -(-len(source) // batch_size)
    for b in range(batches if limit is None else min(limit, batches)):
        windows = [source[w] for w in range(b * batch_size, min((b + 1) * batch_size, len(source)))]
        padding = Batch(np.zeros(seq_len + 1, np.int32), np.full(seq_len + 1, -1, np.int32))
        windows += [padding] * (batch_size - len(windows))
        yield stack(windows)


def evaluate_store(
    eval_step: Callable, params: Any, router_bias: Any, store: TokenStore, seq_len: int, batch_size: int,
    limit: int | None = None, layout: Layout = ONE_DEVICE,
) -> Evaluation:  # fmt: skip
    """Run `eval_step` (`training.step.make_eval_step`) over the store's documents, or their first `limit` batches."""
    sums, load = np.zeros(3), []
    for batch in eval_batches(store, seq_len, batch_size, limit):
        batch = place(layout, batch, range(batch_size), batch_size)
        *values, batch_load = eval_step(params, router_bias, batch)
        sums += np.array([float(v) for v in values])
        batch_load = [np.asarray(a) for a in batch_load]
        load = [a + b for a, b in zip(load, batch_load, strict=True)] if load else batch_load
    nll, correct, tokens = sums.tolist()
    return Evaluation(nll, correct, tokens, load)


def _note_changes(checkpoint: Checkpoint) -> None:
    """Say so on standard error if held-out documents come from another corpus than the run's."""
    known = read_metadata(checkpoint.path).get("corpus")
    if known and is_first() and (changed := identify(checkpoint.config.data).changes_since(known)):
        print(f"held-out documents are of a corpus that has changed since it was trained on: {changed}", file=sys.stderr)


def evaluate(run_or_checkpoint: str | Path, data: str | None = None) -> dict[str, float]:
    """Evaluate a run or checkpoint on its held-out documents, or on other text.

    Uses the run's mesh if there are the devices for it, and one device otherwise. Weights are in 16 or 32 bits, whatever
    `precision.recipe` trains in.

    Args:
        run_or_checkpoint: A run (its latest checkpoint), a checkpoint, or an imported checkpoint.
        data: What `data.path` may be (docs/data.md): a file, folder or glob of .txt, .jsonl or .parquet, several separated by
            commas; None for the held-out documents of the configuration's own data.

    Returns:
        `loss` (nats per token), `perplexity`, `accuracy` (share of tokens that were the likeliest), `tokens` (that were
        predicted), `bits_per_byte` (of the text in UTF-8) and `max_load` (the busiest expert's load over the mean, in the worst
        layer).

    Raises:
        UserError: There is no complete, undamaged checkpoint, or no document in `data`.
    """
    loaded = load_for_evaluation(run_or_checkpoint)
    config = loaded.config
    if data is None:
        store = loaded.corpus().validation
        _note_changes(loaded)
    else:
        store = loaded.read_text(data)
    eval_step = make_eval_step(config, loaded.layout)
    found = evaluate_store(
        eval_step, loaded.params, loaded.router_bias, store, config.data.seq_len, config.data.batch_size, layout=loaded.layout
    )
    return {
        "loss": found.loss,
        "perplexity": found.perplexity,
        "accuracy": found.accuracy,
        "tokens": int(found.tokens),
        "bits_per_byte": found.bits_per_byte(int(store.text_bytes.sum())),
        "max_load": found.max_load,
    }
