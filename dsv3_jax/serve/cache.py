"""The model with its latent cache: new tokens in, next-token logits out (arXiv 2412.19437, section 2.1.1).

A token costs kv_lora_rank + qk_rope_head_dim numbers a layer, whatever the number of heads.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.moe import MoE
from dsv3_jax.model.rope import rope_table
from dsv3_jax.model.transformer import Block, Transformer


class LatentCache(NamedTuple):
    """Of all layers, dense ones first; S is the longest sequence that fits."""

    c_kv_NBSC: Float[Array, "layers B S C"]
    k_rope_NBSR: Float[Array, "layers B S R"]


def empty_cache(config: ModelConfig, batch: int, length: int, dtype: jnp.dtype) -> LatentCache:
    shape = (config.num_hidden_layers, batch, length)
    return LatentCache(jnp.zeros((*shape, config.kv_lora_rank), dtype), jnp.zeros((*shape, config.qk_rope_head_dim), dtype))


def extend(
    model: Transformer, cache: LatentCache, token_BL: Int[Array, "B L"], start: Int[Array, ""]
) -> tuple[Float[Array, "B L D"], LatentCache]:
    """Run L new tokens at positions start.. against the cache; returns final hidden states and the longer cache.

    Entries of the cache at or after `start` are overwritten or out of sight, so that a prompt may be padded on the right.
    """
    B, L = token_BL.shape
    position_L = start + jnp.arange(L)
    rope = rope_table(model.config, jnp.broadcast_to(position_L, (B, L)))
    visible_LS = jnp.arange(cache.c_kv_NBSC.shape[2]) <= position_L[:, None]
    visible_BLS = jnp.broadcast_to(visible_LS, (B, *visible_LS.shape))

    def apply(block: Block, layer_in_stack, layer, x_BLD, cache: LatentCache):
        normed_BLD = block.attention_norm(x_BLD)
        c_kv_BLC, k_rope_BLR = block.attention.latents(normed_BLD, rope)
        cache = LatentCache(
            jax.lax.dynamic_update_slice(cache.c_kv_NBSC, c_kv_BLC[None], (layer, 0, start, 0)),
            jax.lax.dynamic_update_slice(cache.k_rope_NBSR, k_rope_BLR[None], (layer, 0, start, 0)),
        )
        x_BLD = x_BLD + block.attention.decode(normed_BLD, rope, cache.c_kv_NBSC[layer], cache.k_rope_NBSR[layer], visible_BLS)
        normed_BLD = block.ffn_norm(x_BLD)
        ffn = block.ffn
        y_BLD = ffn.decode(normed_BLD, layer_in_stack) if isinstance(ffn, MoE) else ffn(normed_BLD)
        return x_BLD + y_BLD, cache

    x_BLD, first = model.embed(token_BL), 0
    for blocks in (model.dense_blocks, model.moe_blocks):
        if blocks is None:
            continue
        # experts stay whole (see MoE.decode); everything else is scanned
        graph, experts, layers = nnx.split(blocks, _is_expert, ...)
        count = blocks.attention_norm.scale.shape[0]

        def body(carry, xs, graph=graph, experts=experts, first=first):
            layer_in_stack, layer_state = xs
            block = nnx.merge(graph, experts, layer_state)
            return apply(block, layer_in_stack, first + layer_in_stack, *carry), None

        (x_BLD, cache), _ = jax.lax.scan(body, (x_BLD, cache), (jnp.arange(count), layers))
        first += count
    return model.norm(x_BLD), cache


def _is_expert(path: tuple, variable) -> bool:
    return path[-1] in ("w_gate_up_ED2M", "w_down_EMD")
