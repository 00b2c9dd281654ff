"""The training loss (arXiv 2412.19437): cross-entropy, multi-token prediction (eq. 24-25), sequence-wise balance (eq. 17)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv3_jax.data.batch import Batch
from dsv3_jax.model.layout import Traffic
from dsv3_jax.model.moe import RouterStats
from dsv3_jax.model.transformer import Transformer


class LossWeights(NamedTuple):
    mtp: Float[Array, ""] | float
    balance: float


class Share(NamedTuple):
    """What turns a (micro)batch's sums into its share of the full batch's means."""

    weights: LossWeights
    counts: list[Float[Array, ""]]  # targets of the full batch: next token, then each MTP depth
    sequences: int  # of the full batch


class Metrics(NamedTuple):
    """Means over the batch's targets or sequences; `load` and `traffic` are sums over its tokens."""

    loss: Float[Array, ""]  # what is minimised
    cross_entropy: Float[Array, ""]  # nats per token, next-token only
    accuracy: Float[Array, ""]
    mtp_cross_entropy: Float[Array, ""]
    balance_loss: Float[Array, ""]
    traffic: Traffic  # copies of tokens sent to other expert ranks and nodes; a sum over layers
    load: tuple[Float[Array, "layers E"], ...]  # tokens per expert: stacked MoE layers, then each MTP module


def _cross_entropy(model: Transformer, hidden_BLD, batch: Batch, ahead: int, count):
    """Mean nll of the tokens `ahead` places on, over `count` targets, and accuracy."""
    target_BL, counts_BL = batch.targets(ahead, len(model.mtp))
    weight_BL = counts_BL.astype(jnp.float32) / jnp.maximum(count, 1)
    return model.layout.outside_pipeline.cross_entropy(hidden_BLD, model.head_weight(), target_BL, weight_BL, model.core)


def objective(model: Transformer, batch: Batch, share: Share) -> tuple[Float[Array, ""], Metrics]:
    """Loss and metrics of a (micro)batch, as its share of the full batch: those of all microbatches add up.

    The loss is the cross-entropy of the next token, plus that of the MTP modules (equation 25 of arXiv 2412.19437) and the
    sequence-wise balance loss (equation 17), each times its weight.
    """
    hidden_BLD, stats = model.hidden(*batch.inputs(len(model.mtp)))
    return head_objective(model, hidden_BLD, stats, batch, share)


def head_objective(
    model: Transformer,
    hidden_BLD: Float[Array, "B L D"],
    stats: list[RouterStats],
    batch: Batch,
    share: Share,
) -> tuple[Float[Array, ""], Metrics]:
    """`objective` from the final hidden states and the layers' router statistics on."""
    depth = len(model.mtp)
    segment_BL = batch.inputs(depth).segments
    with jax.named_scope("head"):
        cross_entropy, accuracy = _cross_entropy(model, hidden_BLD, batch, 1, share.counts[0])

    mtp_cross_entropy = jnp.float32(0)
    for k in range(depth):
        hidden_BLD, layer_stats = model.mtp_hidden(k, hidden_BLD, batch.tokens_ahead(k + 1, depth), segment_BL)
        stats = [*stats, layer_stats]
        with jax.named_scope("mtp_head"):
            mtp_cross_entropy += _cross_entropy(model, hidden_BLD, batch, k + 2, share.counts[k + 1])[0] / depth

    balance_loss = sum((s.balance_loss.sum() for s in stats), jnp.float32(0)) * (batch.rows / share.sequences)
    loss = cross_entropy + share.weights.mtp * mtp_cross_entropy + share.weights.balance * balance_loss
    traffic = sum_traffic(stats)
    load = tuple(s.load_E for s in stats)
    return loss, Metrics(loss, cross_entropy, accuracy, mtp_cross_entropy, balance_loss, traffic, load)


def sum_traffic(stats: list[RouterStats]) -> Traffic:
    """The traffic of all layers together."""
    zero = Traffic(jnp.float32(0), jnp.float32(0))
    return jax.tree.map(lambda *parts: sum(a.sum() for a in parts), zero, *(s.traffic for s in stats))
