"""Held-out evaluation: sums over whole documents, so that every target counts once."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsv3_jax.data.batches import PackedWindows
from dsv3_jax.data.store import TokenStore
from dsv3_jax.model.layout import Layout
from dsv3_jax.parallel.rows import place
from dsv3_jax.state.train_state import ONE_DEVICE


@dataclass(frozen=True)
class Evaluation:
    nll: float  # nats, summed
    correct: float
    tokens: float
    load: list[np.ndarray]  # tokens per expert, f32[layers, E] a stack

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
        """Busiest expert's load over the mean, worst layer."""
        return max((float((a.max(-1) / a.mean(-1)).max()) for a in self.load), default=1.0)

    def bits_per_byte(self, text_bytes: int) -> float:
        return self.nll / math.log(2) / text_bytes


def eval_batches(store: TokenStore, seq_len: int, batch_size: int, limit: int | None) -> Iterator[dict[str, np.ndarray]]:
    """The documents in order, once; the last batch is filled up with padding. `limit` is a number of batches."""
    source = PackedWindows(store, seq_len, ahead=1, seed=0, shuffle=False)
    batches = -(-len(source) // batch_size)
    for b in range(batches if limit is None else min(limit, batches)):
        windows = [source[w] for w in range(b * batch_size, min((b + 1) * batch_size, len(source)))]
        padding = {"tokens": np.zeros(seq_len + 1, np.int32), "segments": np.full(seq_len + 1, -1, np.int32)}
        windows += [padding] * (batch_size - len(windows))
        yield {name: np.stack([w[name] for w in windows]) for name in padding}


def evaluate(
    eval_step: Callable, params: Any, router_bias: Any, store: TokenStore, seq_len: int, batch_size: int,
    limit: int | None = None, layout: Layout = ONE_DEVICE,
) -> Evaluation:  # fmt: skip
    """Run `eval_step` (see `train/step.py`) over the store, or its first `limit` batches."""
    sums, load = np.zeros(3), []
    for batch in eval_batches(store, seq_len, batch_size, limit):
        batch = place(layout, batch, range(batch_size), batch_size)
        *values, batch_load = eval_step(params, router_bias, batch)
        sums += np.array([float(v) for v in values])
        batch_load = [np.asarray(a) for a in batch_load]
        load = [a + b for a, b in zip(load, batch_load, strict=True)] if load else batch_load
    nll, correct, tokens = sums.tolist()
    return Evaluation(nll, correct, tokens, load)
