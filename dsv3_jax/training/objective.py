"""The training loss (arXiv 2412.19437): cross-entropy, multi-token prediction (eq. 24-25), sequence-wise balance (eq. 17).

With a teacher (`DistillConfig`), its predictions stand beside or in place of the tokens that came.
"""

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
    cross_entropy: float = 1.0  # of the next token and of MTP; 0: both are measured alone


class Guide(NamedTuple):
    """What a teacher predicts for a (micro)batch."""

    hidden: list[Float[Array, "B L C"]]  # normalised for the head: of the next token, then of each MTP depth
    head_CV: Float[Array, "C V"]
    temperature: float


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
    divergence: Float[Array, ""] | None = None  # from the teacher, if there is one: nats per token, next-token only
    mtp_divergence: Float[Array, ""] | None = None


def _cross_entropy(model: Transformer, hidden_BLD, batch: Batch, ahead: int, share: Share):
    """Mean nll of the tokens `ahead` places on, and accuracy."""
    target_BL, weight_BL = _targets(model, batch, ahead, share)
    head_DV = model.head_weight()
    if share.weights.cross_entropy == 0:  # no gradient is computed
        hidden_BLD, head_DV = jax.lax.stop_gradient((hidden_BLD, head_DV))
    return model.layout.outside_pipeline.cross_entropy(hidden_BLD, head_DV, target_BL, weight_BL, model.core)


def _divergence(model: Transformer, hidden_BLD, batch: Batch, ahead: int, share: Share, guide: Guide | None):
    """Mean divergence from the teacher's distributions of the tokens `ahead` places on; 0 without one."""
    if guide is None:
        return jnp.float32(0)
    _, weight_BL = _targets(model, batch, ahead, share)
    teacher_BLC = guide.hidden[ahead - 1]
    return model.layout.outside_pipeline.divergence(
        hidden_BLD, model.head_weight(), teacher_BLC, guide.head_CV, weight_BL, guide.temperature
    )


def _targets(model: Transformer, batch: Batch, ahead: int, share: Share):
    """The tokens `ahead` places on, and what each weighs in the full batch's mean."""
    target_BL, counts_BL = batch.targets(ahead, len(model.mtp))
    return target_BL, counts_BL.astype(jnp.float32) / jnp.maximum(share.counts[ahead - 1], 1)


def guide_of(teacher: Transformer, batch: Batch, temperature: float) -> Guide:
    """What a teacher predicts, without gradients."""
    depth, inputs = len(teacher.mtp), batch.inputs(len(teacher.mtp))
    hidden = [teacher.hidden(*inputs)[0]]
    for k in range(depth):
        hidden.append(teacher.mtp_hidden(k, hidden[-1], batch.tokens_ahead(k + 1, depth), inputs.segments)[0])
    return Guide(*jax.lax.stop_gradient((hidden, teacher.head_weight())), temperature)


def objective(model: Transformer, batch: Batch, share: Share, guide: Guide | None = None) -> tuple[Float[Array, ""], Metrics]:
    """Loss and metrics of a (micro)batch, as its share of the full batch: those of all microbatches add up.

    The loss is the cross-entropy of the next token, plus that of the MTP modules (equation 25 of arXiv 2412.19437) and the
    sequence-wise balance loss (equation 17), each times its weight. With a teacher's `guide`, the divergence from it comes
    besides.
    """
    hidden_BLD, stats = model.hidden(*batch.inputs(len(model.mtp)))
    return head_objective(model, hidden_BLD, stats, batch, share, guide)


def head_objective(
    model: Transformer,
    hidden_BLD: Float[Array, "B L D"],
    stats: list[RouterStats],
    batch: Batch,
    share: Share,
    guide: Guide | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """`objective` from the final hidden states and the layers' router statistics on."""
    depth = len(model.mtp)
    segment_BL = batch.inputs(depth).segments
    with jax.named_scope("head"):
        cross_entropy, accuracy = _cross_entropy(model, hidden_BLD, batch, 1, share)
        divergence = _divergence(model, hidden_BLD, batch, 1, share, guide)

    mtp_cross_entropy = mtp_divergence = jnp.float32(0)
    for k in range(depth):
        hidden_BLD, layer_stats = model.mtp_hidden(k, hidden_BLD, batch.tokens_ahead(k + 1, depth), segment_BL)
        stats = [*stats, layer_stats]
        with jax.named_scope("mtp_head"):
            mtp_cross_entropy += _cross_entropy(model, hidden_BLD, batch, k + 2, share)[0] / depth
            mtp_divergence += _divergence(model, hidden_BLD, batch, k + 2, share, guide) / depth

    balance_loss = sum((s.balance_loss.sum() for s in stats), jnp.float32(0)) * (batch.rows / share.sequences)
    weights = share.weights
    loss = weights.cross_entropy * (cross_entropy + weights.mtp * mtp_cross_entropy) + weights.balance * balance_loss
    traffic = sum_traffic(stats)
    load = tuple(s.load_E for s in stats)
    metrics = Metrics(loss, cross_entropy, accuracy, mtp_cross_entropy, balance_loss, traffic, load)
    if guide is None:
        return loss, metrics
    loss += divergence + weights.mtp * mtp_divergence
    return loss, metrics._replace(loss=loss, divergence=divergence, mtp_divergence=mtp_divergence)


def sum_traffic(stats: list[RouterStats]) -> Traffic:
    """The traffic of all layers together."""
    zero = Traffic(jnp.float32(0), jnp.float32(0))
    return jax.tree.map(lambda *parts: sum(a.sum() for a in parts), zero, *(s.traffic for s in stats))
