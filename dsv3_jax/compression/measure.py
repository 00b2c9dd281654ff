"""What compression did to a model: loss, KL divergence, top-1 and what multi-token prediction drafts, beside the original.

Everything is counted by window, so that two models are compared on the same windows and an interval says how much of a
difference is chance. Models may have different configurations, such as fewer experts, but one vocabulary.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from scipy import stats

from dsv3_jax.data.batch import Batch, stack
from dsv3_jax.data.batches import PackedWindows
from dsv3_jax.data.store import TokenStore
from dsv3_jax.model.transformer import Transformer
from pallas_kernels.products import dot


class Ratio(NamedTuple):
    """A ratio of two sums over windows, with the half-width of its 95% interval (Student's t, windows taken as independent)."""

    value: float
    ci95: float


def ratio_of_sums(over: np.ndarray, under: np.ndarray) -> Ratio:
    """sum(over) / sum(under) of f[W] each, paired by window; the interval is the delta method's (Cochran 1977, section 6.4)."""
    windows, total = len(over), float(under.sum())
    if total == 0:
        return Ratio(math.nan, math.nan)
    value = float(over.sum()) / total
    if windows < 2:
        return Ratio(value, math.nan)
    variance = windows / (windows - 1) * float(np.square(over - value * under).sum())
    return Ratio(value, float(stats.t.ppf(0.975, windows - 1)) * math.sqrt(variance) / total)


class Outputs(NamedTuple):
    """What a model says of a batch."""

    logits_BLV: Float[Array, "B L V"]  # float32, of the next token
    drafts_KBL: Int[Array, "K B L"]  # the likeliest token of each MTP module: that k + 2 places on, k from 0


@dataclass(frozen=True)
class Comparison:
    """Sums over each window's targets, f64[W], of a model and of the original; f64[W, K] by MTP module."""

    targets: np.ndarray
    nll: np.ndarray  # nats
    original_nll: np.ndarray
    correct: np.ndarray  # targets that were the likeliest token
    original_correct: np.ndarray
    kl: np.ndarray  # of the original's distribution from the model's, nats
    agreed: np.ndarray  # positions with the original's likeliest token
    drafted: np.ndarray  # places for which there was a draft
    accepted: np.ndarray  # drafts that the model itself would have chosen
    original_accepted: np.ndarray

    def figures(self) -> dict[str, Any]:
        """Means, as JSON takes them; changes are against the original, each {value, ci95}, null where there is none."""

        def paired(over: np.ndarray, under: np.ndarray, less: float = 0.0) -> dict[str, float | None]:
            value, ci95 = (None if math.isnan(a) else a for a in ratio_of_sums(over, under))
            return {"value": None if value is None else value - less, "ci95": ci95}

        depths = range(self.drafted.shape[1])
        drafted = self.drafted
        return {
            "windows": len(self.targets),
            "targets": int(self.targets.sum()),
            "loss": float(self.nll.sum() / self.targets.sum()),
            "original_loss": float(self.original_nll.sum() / self.targets.sum()),
            "accuracy": float(self.correct.sum() / self.targets.sum()),
            "loss_change": paired(self.nll, self.original_nll, 1.0),  # relative
            "kl": paired(self.kl, self.targets),
            "top1_kept": paired(self.correct, self.original_correct),
            "agreement": paired(self.agreed, self.targets),
            "mtp_acceptance": [paired(self.accepted[:, k], drafted[:, k]) for k in depths],
            "original_mtp_acceptance": [paired(self.original_accepted[:, k], drafted[:, k]) for k in depths],
            "mtp_acceptance_change": [
                paired(self.accepted[:, k] - self.original_accepted[:, k], drafted[:, k]) for k in depths
            ],
        }


def measuring_batches(store: TokenStore, seq_len: int, depth: int, batch_size: int) -> Iterator[Batch]:
    """The documents of a store in order, once, as batches with the tokens ahead that `depth` MTP modules need.

    The last batch is filled up with padding.
    """
    source = PackedWindows(store, seq_len, 1 + depth, seed=0, shuffle=False)
    size = seq_len + 1 + depth
    padding = Batch(np.zeros(size, np.int32), np.full(size, -1, np.int32))
    for first in range(0, len(source), batch_size):
        windows = [source[w] for w in range(first, min(first + batch_size, len(source)))]
        yield stack(windows + [padding] * (batch_size - len(windows)))


def compare(original: Transformer, models: Mapping[str, Transformer], batches: Iterable[Batch]) -> dict[str, Comparison]:
    """Measure models beside the one that they came from.

    Args:
        original: The model before compression.
        models: {name: model} with its vocabulary and number of MTP modules.
        batches: From `measuring_batches`; a window without a target is left out.

    Returns:
        {name: its comparison}.
    """
    found: dict[str, list[tuple]] = {name: [] for name in models}
    halves = {name: nnx.split(model) for name, model in models.items()}
    reference_half = nnx.split(original)
    for batch in batches:
        reference = _outputs(*reference_half, batch)
        for name, half in halves.items():
            found[name].append(jax.device_get(_window_sums(reference, _outputs(*half, batch), batch)))
    return {name: _joined(parts) for name, parts in found.items()}


def _joined(parts: list[tuple]) -> Comparison:
    columns = [np.concatenate(column).astype(np.float64) for column in zip(*parts, strict=True)]
    live = columns[0] > 0
    return Comparison(*(column[live] for column in columns))


@functools.partial(jax.jit, static_argnums=0)
def _outputs(graph: nnx.GraphDef[Transformer], state: nnx.State, batch: Batch) -> Outputs:
    model = nnx.merge(graph, state)
    depth, head_DV = len(model.mtp), model.head_weight().astype(model.dtype)
    inputs = batch.inputs(depth)
    hidden_BLD, _ = model.hidden(*inputs)
    logits_BLV = dot(hidden_BLD, head_DV, dtype=jnp.float32)
    drafts = []
    for k in range(depth):
        hidden_BLD, _ = model.mtp_hidden(k, hidden_BLD, batch.tokens_ahead(k + 1, depth), inputs.segments)
        drafts.append(dot(hidden_BLD, head_DV, dtype=jnp.float32).argmax(-1))
    return Outputs(logits_BLV, jnp.stack(drafts) if drafts else jnp.zeros((0, *inputs.tokens.shape), jnp.int32))


@jax.jit
def _window_sums(reference: Outputs, found: Outputs, batch: Batch) -> tuple[Array, ...]:
    """The fields of `Comparison` in order, of a batch's rows."""
    depth = len(found.drafts_KBL)
    target_BL, counts_BL = batch.targets(1, depth)
    log_p, log_q = (jax.nn.log_softmax(a.logits_BLV) for a in (reference, found))
    chosen, original_chosen = (a.logits_BLV.argmax(-1) for a in (found, reference))

    def summed(values_BL: Array) -> Array:
        return jnp.where(counts_BL, values_BL, 0).sum(1, dtype=jnp.float32)

    def nll(log_probs_BLV: Array) -> Array:
        return -jnp.take_along_axis(log_probs_BLV, target_BL[..., None], axis=-1)[..., 0]

    drafted, accepted = _accepted(found, batch)
    sums = (
        summed(jnp.ones(target_BL.shape)),
        summed(nll(log_q)),
        summed(nll(log_p)),
        summed(chosen == target_BL),
        summed(original_chosen == target_BL),
        summed((jnp.exp(log_p) * (log_p - log_q)).sum(-1)),
        summed(chosen == original_chosen),
        drafted,
        accepted,
        _accepted(reference, batch)[1],
    )
    assert len(sums) == len(fields(Comparison))
    return sums


def _accepted(outputs: Outputs, batch: Batch) -> tuple[Float[Array, "B K"], Float[Array, "B K"]]:
    """How many drafts of each MTP module there were, and how many a greedy main model takes, given the text up to there.

    Module k's draft at position i is of the token that the main model chooses at position i + k + 1.
    """
    drafts_KBL = outputs.drafts_KBL
    chosen_BL = outputs.logits_BLV.argmax(-1)
    B, L = chosen_BL.shape
    drafted, accepted = [], []
    for k in range(len(drafts_KBL)):
        counts_BL = batch.targets(k + 2, len(drafts_KBL))[1][:, : L - k - 1]
        drafted.append(counts_BL.sum(1))
        accepted.append((counts_BL & (drafts_KBL[k, :, : L - k - 1] == chosen_BL[:, k + 1 :])).sum(1))
    empty = jnp.zeros((B, 0))
    return (jnp.stack(drafted, 1), jnp.stack(accepted, 1)) if drafted else (empty, empty)
