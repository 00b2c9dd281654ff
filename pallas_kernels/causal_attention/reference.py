"""Definition of causal attention within segments: the whole score matrix at once."""

import jax
import jax.numpy as jnp

from pallas_kernels.products import einsum


def causal_attention(q_BLHX, k_BLHX, v_BLHU, segment_BL, scale: float):
    """See `api.causal_attention`. Holds B*H*L*L scores: for tests only."""
    scores_BHLS = einsum("blhx,bshx->bhls", q_BLHX, k_BLHX, dtype=jnp.float32) * scale
    L = q_BLHX.shape[1]
    causal_LS = jnp.arange(L)[:, None] >= jnp.arange(L)[None, :]
    same_BLS = segment_BL[:, :, None] == segment_BL[:, None, :]
    probs_BHLS = jax.nn.softmax(jnp.where((causal_LS & same_BLS)[:, None], scores_BHLS, -jnp.inf), axis=-1)
    out = einsum("bhls,bshu->blhu", probs_BHLS.astype(v_BLHU.dtype), v_BLHU, dtype=jnp.float32)
    return out.astype(v_BLHU.dtype)
