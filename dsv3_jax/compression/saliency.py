"""Which routed experts a layer can do without: what calibration text says of each, and the scores made of it.

A score is a function (Evidence) -> f32[E]; the experts with the lowest go. "sum" is the one that loses least here, whatever is
done afterwards (docs/compression.md).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.compression.features import ExpertFeatures
from pallas_kernels.products import dot


class Evidence(NamedTuple):
    """Sums over the tokens that chose an expert, of an MoE layer as it was trained."""

    tokens_E: Float[Array, " E"]
    output_E: Float[Array, " E"]  # of the norm of the expert's output times its weight in the layer's


def evidence(features: ExpertFeatures, w_down_EMD: Float[Array, "E M D"], tokens: int) -> Evidence:
    """What `tokens` tokens say, from the hidden activations that `features` have of each expert."""

    def of_expert(expert: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        token_C, hidden_CM, w_down_MD = expert
        return jnp.sum(token_C < tokens, dtype=jnp.float32), jnp.linalg.norm(dot(hidden_CM, w_down_MD), axis=-1).sum()

    return Evidence(*jax.lax.map(of_expert, (*features, w_down_EMD)))


def use(seen: Evidence) -> Float[Array, " E"]:
    """How many tokens chose the expert."""
    return seen.tokens_E


def total_output(seen: Evidence) -> Float[Array, " E"]:
    """How much the expert adds to the layer's output in all: REAP's mean times use."""
    return seen.output_E


def mean_output(seen: Evidence) -> Float[Array, " E"]:
    """How much the expert adds to the output of a token that chose it (REAP, arXiv 2510.13999, equation 9)."""
    return seen.output_E / jnp.maximum(seen.tokens_E, 1)


SALIENCIES: dict[str, Callable[[Evidence], Float[Array, " E"]]] = {
    "sum": total_output,
    "reap": mean_output,
    "use": use,
}


def most_salient(saliency_E: Float[Array, " E"], groups: int, experts: int) -> Int[Array, " kept"]:
    """The `experts` experts to keep, in order: those with the highest score of each group, as many of every one.

    Of equal scores the first is kept.
    """
    per_group, size = experts // groups, saliency_E.shape[0] // groups
    best_GK = jax.lax.top_k(saliency_E.reshape(groups, size), per_group)[1]
    return jnp.sort((best_GK + jnp.arange(groups)[:, None] * size).reshape(-1))


# --- single weights: scores and masks for studies of what sparse weights cost (see sparse.py) -------------------------------


def magnitude(w_KN: Float[Array, "K N"], moment_K: Float[Array, " K"]) -> Float[Array, "K N"]:
    """|w|, whatever its input is like."""
    return jnp.abs(w_KN)


def wanda(w_KN: Float[Array, "K N"], moment_K: Float[Array, " K"]) -> Float[Array, "K N"]:
    """|w| times the norm of its input over the calibration text (Wanda, arXiv 2306.11695), whose squares are `moment_K`."""
    return jnp.abs(w_KN) * jnp.sqrt(moment_K)[:, None]


def keep_half(saliency_KN: Float[Array, "K N"]) -> Bool[Array, "K N"]:
    """The half of each output's weights with the highest score."""
    rank_KN = jnp.argsort(jnp.argsort(-saliency_KN, axis=0), axis=0)
    return rank_KN < saliency_KN.shape[0] // 2


def keep_two_of_four(saliency_KN: Float[Array, "K N"]) -> Bool[Array, "K N"]:
    """The two with the highest score of each four weights of an output, along the inputs: "2:4"."""
    K, N = saliency_KN.shape
    by_four = saliency_KN.reshape(K // 4, 4, N)
    rank = jnp.argsort(jnp.argsort(-by_four, axis=1), axis=1)
    return (rank < 2).reshape(K, N)
