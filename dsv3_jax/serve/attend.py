"""Attention of new tokens over cached latents, one for all heads (arXiv 2405.04434, section 2.1.2).

Scores and sums are float32. Letters as in `model.layers`; P pages of S positions.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.products import einsum

PAGE = 16  # positions of a page
_PAGES_AT_ONCE = 16


class LayerPages(NamedTuple):
    """A layer's latents."""

    c_kv_PSC: Float[Array, "P S C"]
    k_rope_PSR: Float[Array, "P S R"]


def table_width(positions: int) -> int:
    """The pages that a sequence's table has for this many positions."""
    return -(-positions // (PAGE * _PAGES_AT_ONCE)) * _PAGES_AT_ONCE


def over_cache(
    q_latent_BLHC: Float[Array, "B L H C"],
    q_rope_BLHR: Float[Array, "B L H R"],
    c_kv_BSC: Float[Array, "B S C"],
    k_rope_BSR: Float[Array, "B S R"],
    visible_BLS: Bool[Array, "B L S"],
    scale: float,
) -> Float[Array, "B L H C"]:
    """Each head's mean of the visible latents, weighted by softmax(scale * q k)."""
    scores_BLHS = jnp.where(
        visible_BLS[:, :, None], _scores(q_latent_BLHC, q_rope_BLHR, c_kv_BSC, k_rope_BSR) * scale, -jnp.inf
    )
    probs_BLHS = jax.nn.softmax(scores_BLHS, axis=-1).astype(q_latent_BLHC.dtype)
    return einsum("blhs,bsc->blhc", probs_BLHS, c_kv_BSC)


def over_pages(
    q_latent_BLHC: Float[Array, "B L H C"],
    q_rope_BLHR: Float[Array, "B L H R"],
    pages: LayerPages,
    page_BP: Int[Array, "B P"],
    position_BL: Int[Array, "B L"],
    scale: float,
) -> Float[Array, "B L H C"]:
    """The same over positions 0 to `position_BL` of sequences whose pages a table names, as `table_width` has it.

    A loop over some pages of all sequences at a time, as far as the longest goes. What is not visible adds exact zeros, so that
    a row's bits do not depend on how long the others are.
    """
    B, L, H, C = q_latent_BLHC.shape
    S = PAGE * _PAGES_AT_ONCE

    def some_pages(i, carry):
        largest_BLH, sum_BLH, out_BLHC = carry
        some_BP = lax.dynamic_slice_in_dim(page_BP, i * _PAGES_AT_ONCE, _PAGES_AT_ONCE, axis=1)
        c_kv_BSC, k_rope_BSR = (a[some_BP].reshape(B, S, a.shape[-1]) for a in pages)
        visible_BLS = i * S + jnp.arange(S) <= position_BL[..., None]
        scores_BLHS = _scores(q_latent_BLHC, q_rope_BLHR, c_kv_BSC, k_rope_BSR) * scale
        scores_BLHS = jnp.where(visible_BLS[:, :, None], scores_BLHS, -jnp.inf)
        before_BLH, largest_BLH = largest_BLH, jnp.maximum(largest_BLH, scores_BLHS.max(-1))
        weight_BLHS, kept_BLH = jnp.exp(scores_BLHS - largest_BLH[..., None]), jnp.exp(before_BLH - largest_BLH)
        some_BLHC = einsum("blhs,bsc->blhc", weight_BLHS.astype(c_kv_BSC.dtype), c_kv_BSC, dtype=jnp.float32)
        return largest_BLH, sum_BLH * kept_BLH + weight_BLHS.sum(-1), out_BLHC * kept_BLH[..., None] + some_BLHC

    zeros_BLH = jnp.zeros((B, L, H), jnp.float32)
    init = zeros_BLH - jnp.inf, zeros_BLH, jnp.zeros((B, L, H, C), jnp.float32)
    _, sum_BLH, out_BLHC = lax.fori_loop(0, position_BL.max() // S + 1, some_pages, init)
    return (out_BLHC / sum_BLH[..., None]).astype(q_latent_BLHC.dtype)


def _scores(q_latent_BLHC: Array, q_rope_BLHR: Array, c_kv_BSC: Array, k_rope_BSR: Array) -> Float[Array, "B L H S"]:
    scores_BLHS = einsum("blhc,bsc->blhs", q_latent_BLHC, c_kv_BSC, dtype=jnp.float32)
    return scores_BLHS + einsum("blhr,bsr->blhs", q_rope_BLHR, k_rope_BSR, dtype=jnp.float32)
