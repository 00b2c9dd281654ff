"""Dropping routed experts, as many from each group of each layer, so that group-limited routing stays what it is.

The driver, layer by layer, hands over the residual streams of the original and of the compressed model after attention, and
takes back the block with fewer experts, refitted (refit.py), whose feed-forward weights are then rounded if they are to be:

    experts = kept_experts(config, settings.fraction)      # once, before anything is read
    pruned = prune_layer(block, experts, settings, original_TD, current_TD, real_T)    # each MoE layer and MTP module
    pruned.block, pruned.report                            # attention of `block` as it is
    pruned_config(config, experts)                         # what the new checkpoint's config.model is
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
from flax import nnx
from jaxtyping import Array, Bool, Float

from dsv3_jax.checks import in_range, not_negative, positive, require
from dsv3_jax.compression.features import DownWeights, down_weights, moe_features, outputs
from dsv3_jax.compression.refit import refit
from dsv3_jax.compression.saliency import SALIENCIES, evidence, most_salient
from dsv3_jax.config import ModelConfig
from dsv3_jax.model.moe import MoE
from dsv3_jax.model.transformer import Block


@dataclass(frozen=True)
class PruneConfig:
    """Which routed experts go, and what makes up for them."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid", strict=True)
    fraction: float = 0.0  # of the experts of each group that are dropped; 0: none
    saliency: Literal["sum", "reap", "use"] = "sum"  # which go: see compression/saliency.py
    ridge: float | None = 0.01  # of the refit of down projections, in mean squares of what they read; null: no refit
    rounds: int = 1  # in which they go, refitted and judged anew after each

    def __post_init__(self) -> None:
        in_range("prune", self)
        require(0 <= self.fraction < 1, f"prune.fraction={self.fraction} must lie in [0, 1)")
        positive("prune", self, "rounds")
        if self.ridge is not None:
            not_negative("prune", self, "ridge")


def kept_experts(config: ModelConfig, fraction: float) -> int:
    """How many experts a model keeps that loses `fraction` of each group's.

    Raises `UserError` if that is no whole number of experts, or leaves too few for its routing: a group's score is the sum of
    its best 2, and the groups that a token may use must hold all the experts that it takes.
    """
    size = config.n_routed_experts // config.n_group
    least = max(2, -(-config.num_experts_per_tok // config.topk_group))
    kept = size * (1 - fraction)
    most = 1 - least / size
    require(
        abs(kept - round(kept)) < 1e-3 and round(kept) >= least,
        f"prune.fraction={fraction:g} leaves {kept:g} of the {size} experts of a group, and routing needs a whole number from "
        f"{least} on: model.topk_group={config.topk_group} groups hold a token's {config.num_experts_per_tok}, and a group's "
        f"score is the sum of its best 2; use a multiple of {1 / size:g} up to {most:g}",
    )
    return round(kept) * config.n_group


def pruned_config(config: ModelConfig, experts: int) -> ModelConfig:
    """The configuration of a model that keeps `experts` experts in every layer."""
    return replace(config, n_routed_experts=experts)


class PrunedLayer(NamedTuple):
    """A block with fewer experts, and what happened to it."""

    block: Block
    report: dict[str, Any]


def without_experts(block: Block, kept: np.ndarray) -> Block:
    """A copy of an MoE block that has the experts `kept` alone: their weights, router columns and balancing bias."""
    found = nnx.clone(block)
    moe: Any = found.ffn
    config = pruned_config(moe.config, len(kept))
    moe.config = moe.router.config = config
    for variable, axis in ((moe.w_gate_up_ED2M, 0), (moe.w_down_EMD, 0), (moe.router.w_DE, 1), (moe.router.bias_E, 0)):
        variable.set_value(jnp.take(variable.get_value(), jnp.asarray(kept), axis=axis))
    return found


def prune_layer(
    block: Block,
    experts: int,
    settings: PruneConfig,
    original_TD: Float[Array, "T D"],
    current_TD: Float[Array, "T D"],
    real_T: Bool[Any, " T"],
) -> PrunedLayer:
    """Drop experts of an MoE block, and refit what is left.

    Args:
        block: Its feed-forward part is the original's.
        experts: How many to keep, from `kept_experts`.
        settings: `fraction` is not read.
        original_TD: f32[T, D], the residual stream between attention and feed-forward of the original model.
        current_TD: The same of the model that is being compressed.
        real_T: Which tokens are no padding.

    Returns:
        A block after which the compressed model's stream is as near to the original's as its down projections can bring it; and
        `kept` (the experts' old numbers), `tokens` (that chose each before), `lacking` (of the squared output, before and after
        the refit).
    """
    moe: Any = block.ffn
    original_TD, current_TD, real_T = (jnp.asarray(a) for a in (original_TD, current_TD, real_T))
    features = moe_features(moe, block.ffn_norm(original_TD), real_T)
    wanted_TD = original_TD + outputs(features, down_weights(moe)) - current_TD
    seen = evidence(features.routed, moe.w_down_EMD[...], len(real_T))
    tokens_E = np.asarray(seen.tokens_E)
    normed_TD = block.ffn_norm(current_TD)
    found, kept = block, np.arange(moe.config.n_routed_experts)
    before = after = jnp.float32(0)
    for count in _counts(len(kept), experts, moe.config.n_group, settings.rounds):
        if found is not block:  # judged anew, as it is now
            seen = evidence(features.routed, moe.w_down_EMD[...], len(real_T))
        chosen = np.asarray(most_salient(SALIENCIES[settings.saliency](seen), moe.config.n_group, count))
        found, kept = without_experts(found, chosen), kept[chosen]
        moe = found.ffn
        features = moe_features(moe, normed_TD, real_T)
        before = after = _lacking(features, down_weights(moe), wanted_TD, real_T)
        if settings.ridge is not None:
            _set_down(moe, _refitted(features, down_weights(moe), wanted_TD, real_T, settings.ridge))
            after = _lacking(features, down_weights(moe), wanted_TD, real_T)
    report = {"kept": kept.tolist(), "tokens": tokens_E.tolist(), "lacking": [float(before), float(after)]}
    return PrunedLayer(found, report)


def _counts(experts: int, kept: int, groups: int, rounds: int) -> list[int]:
    """How many experts are left after each round; rounds that would drop none are left out."""
    sizes = np.rint(np.linspace(experts // groups, kept // groups, rounds + 1)).astype(int)
    return [int(size) * groups for size in dict.fromkeys(sizes[1:]) if size < experts // groups]


@jax.jit
def _lacking(features: Any, weights: DownWeights, wanted_TD: Array, real_T: Array) -> Array:
    """How much of the wanted output is missing, both squared."""
    missing_TD = wanted_TD - outputs(features, weights)
    over, under = (jnp.sum(jnp.square(jnp.where(real_T[:, None], a, 0))) for a in (missing_TD, wanted_TD))
    return over / jnp.maximum(under, jnp.finfo(jnp.float32).tiny)


@jax.jit
def _refitted(features: Any, weights: DownWeights, wanted_TD: Array, real_T: Array, ridge: float) -> DownWeights:
    lacking_TD = jnp.where(real_T[:, None], wanted_TD - outputs(features, weights), 0)
    return jax.tree.map(jnp.add, weights, refit(features, lacking_TD, ridge))


def _set_down(moe: MoE, weights: DownWeights) -> None:
    moe.w_down_EMD.set_value(weights.routed_EMD)
    moe.shared.w_down_FD.set_value(weights.shared_SD)
