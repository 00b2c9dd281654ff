"""The statistics of logits that cross-entropy needs: each row's largest, the sum of exponentials, and the one at the target."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.products import dot

NEG = -1e30  # in place of a logit that is not there: exp(0), never NaN, once the largest is subtracted


class LogitStatistics(NamedTuple):
    """float32 statistics of the logits x w; with a sharded vocabulary, of this device's columns."""

    top_T: Float[Array, " T"]  # largest logit
    total_T: Float[Array, " T"]  # sum of exp(logit - top)
    at_target_T: Float[Array, " T"]  # logit of the target, 0 where it lies outside of the columns
    logits_TV: Float[Array, "T V"] | None  # if they are to be kept


def logit_statistics(
    x_TD: Float[Array, "T D"], w_DV: Float[Array, "D V"], target_T: Int[Array, " T"], keep: bool
) -> LogitStatistics:
    """The definition, in plain JAX."""
    logits_TV = dot(x_TD, w_DV, dtype=jnp.float32)
    top_T = logits_TV.max(-1)
    total_T = jnp.exp(logits_TV - top_T[:, None]).sum(-1)
    here_T = (target_T >= 0) & (target_T < w_DV.shape[1])
    at_target_T = jnp.take_along_axis(logits_TV, target_T[:, None], axis=-1, mode="clip")[:, 0]
    return LogitStatistics(top_T, total_T, jnp.where(here_T, at_target_T, 0), logits_TV if keep else None)


def over_blocks(top_bT: Array, total_bT: Array, at_target_bT: Array, logits_TV: jax.Array | None) -> LogitStatistics:
    """The statistics of all columns from those of b blocks of columns."""
    top_T = top_bT.max(0)
    total_T = jnp.sum(total_bT * jnp.exp(top_bT - top_T), axis=0)
    return LogitStatistics(top_T, total_T, at_target_bT.sum(0), logits_TV)
