"""The model with its latent cache: new tokens in, next-token logits out (arXiv 2412.19437, section 2.1.1).

A token costs kv_lora_rank + qk_rope_head_dim numbers a layer, whatever the number of heads.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.layout import Layout
from dsv3_jax.model.moe import MoE, RoutedExperts
from dsv3_jax.model.rope import attention_scale, rope_table
from dsv3_jax.model.transformer import Block, Transformer
from dsv3_jax.serve.attend import over_cache
from pallas_kernels import dense_is_worthwhile, dense_swiglu, grouped_swiglu, integer_experts
from pallas_kernels.integer_weight import IntegerWeight

_STACKED = (None, "experts", None, None, "moe_ffn"), (None, "experts", "moe_ffn", None)  # axes of all layers' experts


class LatentCache(NamedTuple):
    """The latents of all layers, dense ones first; S is the longest sequence that fits."""

    c_kv_NBSC: Float[Array, "layers B S C"]
    k_rope_NBSR: Float[Array, "layers B S R"]


class Layer(NamedTuple):
    """One layer, taken out of its stack."""

    block: Block
    experts: RoutedExperts | None  # None: a dense layer


def indices(*of_axes: int | Array) -> tuple[Array, ...]:
    """Indices of one type, as JAX wants them: with JAX_ENABLE_X64 Python's numbers would have 64 bits beside arrays' 32."""
    return tuple(jnp.asarray(index, jnp.int32) for index in of_axes)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def empty_cache(config: ModelConfig, layout: Layout, batch: int, length: int, dtype: jnp.dtype) -> LatentCache:
    """A cache of zeros for `batch` sequences of `length`, sharded as the layout of its model wants."""
    shape = (config.num_hidden_layers, batch, length)
    c_kv_NBSC = jnp.zeros((*shape, config.kv_lora_rank), dtype)
    return _constrained(layout, LatentCache(c_kv_NBSC, jnp.zeros((*shape, config.qk_rope_head_dim), dtype)))


def _constrained(layout: Layout, cache: LatentCache) -> LatentCache:
    return LatentCache(*(layout.constrain(a, None, "cache_batch", None, None) for a in cache))


def unstack(model: Transformer, tokens: int) -> list[Layer]:
    """The layers one by one, for steps of `tokens` tokens in all. Call it outside of a decoding loop.

    A scan over layers would copy every layer's weights out of the stack again for every token.
    """
    layers = []
    for blocks in (model.dense_blocks, model.moe_blocks):
        if blocks is None:
            continue
        graph, _, rest = nnx.split(blocks, _is_expert, ...)
        for i in range(blocks.attention_norm.scale.shape[0]):
            layer = _side_by_side(jax.tree.map(lambda a, i=i: a[i], rest))
            block = nnx.merge(graph, _without_experts(blocks), layer)
            block.attention.absorb(model.dtype)
            experts = _routed_experts(blocks.ffn, i, tokens, model.dtype) if isinstance(blocks.ffn, MoE) else None
            layers.append(Layer(block, experts))
    return layers


def _side_by_side(tree: Any) -> Any:
    """Integer weights as the kernels of every step read them."""

    def merged(leaf: Any) -> Any:
        return leaf.side_by_side() if isinstance(leaf, IntegerWeight) else leaf

    return jax.tree.map(merged, tree, is_leaf=lambda leaf: isinstance(leaf, IntegerWeight))


def _is_expert(path: tuple, variable) -> bool:
    return path[-1] in ("w_gate_up_ED2M", "w_down_EMD")


def _without_experts(blocks: Block) -> nnx.State:
    """Empty arrays in the place of the experts' weights, which `Layer.experts` holds."""
    return jax.tree.map(lambda a: jnp.zeros(0, a.dtype), nnx.state(blocks, _is_expert))


def _routed_experts(stack: MoE, layer: int, tokens: int, dtype: jnp.dtype) -> RoutedExperts:
    """Layer `layer`'s experts, in the layout that a step of `tokens` tokens reads fastest."""
    integers = stack.w_gate_up_ED2M[...], stack.w_down_EMD[...]
    if isinstance(integers[0], IntegerWeight):
        return _integer(stack.layout, layer, *integers)
    w_gate_up_NED2M, w_down_NEMD = stack.w_gate_up_ED2M.astype(dtype), stack.w_down_EMD.astype(dtype)
    w_gate_up_NED2M = stack.layout.constrain(w_gate_up_NED2M, None, "experts", None, None, "moe_ffn")
    w_down_NEMD = stack.layout.constrain(w_down_NEMD, None, "experts", "moe_ffn", None)
    dense = dense_is_worthwhile(tokens, stack.config.num_experts_per_tok, stack.config.n_routed_experts)
    return (_dense if dense else _grouped)(stack.layout, layer, w_gate_up_NED2M, w_down_NEMD)


def _integer(layout: Layout, layer: int, w_gate_up_NED2M: IntegerWeight, w_down_NEMD: IntegerWeight) -> RoutedExperts:
    weights = w_gate_up_NED2M, w_down_NEMD
    if layout.size == 1:  # a mesh shards the axes that the model names
        weights = _side_by_side(weights)
    return functools.partial(layout.held_experts, _of_stack(layer, integer_experts), weights, _STACKED)


def _dense(layout: Layout, layer: int, w_gate_up_NED2M: Array, w_down_NEMD: Array) -> RoutedExperts:
    # the barrier keeps one plain transpose of the whole stack, which is much faster than one fused into each slice
    w_gate_up_NDE2M = jax.lax.optimization_barrier(jnp.moveaxis(w_gate_up_NED2M, 1, 2))
    weights = w_gate_up_NDE2M[layer], w_down_NEMD[layer]
    axes = (None, "experts", None, "moe_ffn"), ("experts", "moe_ffn", None)

    def held(w_gate_up_DE2M, w_down_EMD, x_TD, expert_TK, weight_TK):
        return dense_swiglu(x_TD, w_gate_up_DE2M, w_down_EMD, expert_TK, weight_TK)

    return functools.partial(layout.held_experts, held, weights, axes)


def _grouped(layout: Layout, layer: int, w_gate_up_NED2M: Array, w_down_NEMD: Array) -> RoutedExperts:
    return functools.partial(layout.held_experts, _of_stack(layer, grouped_swiglu), (w_gate_up_NED2M, w_down_NEMD), _STACKED)


def _of_stack(layer: int, experts: Callable[..., Array]) -> Callable[..., Array]:
    """`experts` of one layer, given all layers' as one long list: it reads those that are chosen, and nothing is copied."""

    def held(w_gate_up_NED2M, w_down_NEMD, x_TD, expert_TK, weight_TK):
        N, E = w_down_NEMD.shape[:2]
        expert_TK = jnp.where(expert_TK < E, expert_TK + layer * E, N * E)
        listed = jax.tree.map(lambda a: a.reshape(N * E, *a.shape[2:]), (w_gate_up_NED2M, w_down_NEMD))
        return experts(x_TD, *listed, expert_TK, weight_TK)

    return held


def _where_the_cache_is(layout: Layout, attend: Callable[..., Array]) -> Callable[..., Array]:
    def moved(*queries: Array) -> Array:
        return attend(*(layout.constrain(q, "cache_batch", None, "heads", None) for q in queries))

    return moved


def extend(
    model: Transformer, layers: list[Layer], cache: LatentCache, token_BL: Int[Array, "B L"], start: Int[Array, ""]
) -> tuple[Float[Array, "B L D"], LatentCache]:
    """Run L new tokens at positions start.. against the cache; returns final hidden states and the longer cache.

    Entries of the cache at or after `start` are overwritten or out of sight, so that a prompt may be padded on the right.
    """
    B, L = token_BL.shape
    position_L = start + jnp.arange(L)
    rope = rope_table(model.config, jnp.broadcast_to(position_L, (B, L)))
    visible_LS = jnp.arange(cache.c_kv_NBSC.shape[2]) <= position_L[:, None]
    visible_BLS = jnp.broadcast_to(visible_LS, (B, *visible_LS.shape))
    c_kv_NBSC, k_rope_NBSR = _constrained(model.layout, cache)

    x_BLD = model.embed(token_BL)
    for i, (block, experts) in enumerate(layers):
        normed_BLD = block.attention_norm(x_BLD)
        c_kv_BLC, k_rope_BLR = block.attention.latents(normed_BLD, rope)
        c_kv_NBSC = jax.lax.dynamic_update_slice(c_kv_NBSC, c_kv_BLC[None], indices(i, 0, start, 0))
        k_rope_NBSR = jax.lax.dynamic_update_slice(k_rope_NBSR, k_rope_BLR[None], indices(i, 0, start, 0))
        cached = {"c_kv_BSC": c_kv_NBSC[i], "k_rope_BSR": k_rope_NBSR[i], "visible_BLS": visible_BLS}
        attend = functools.partial(over_cache, **cached, scale=attention_scale(model.config))
        attend = _where_the_cache_is(model.layout, attend)
        x_BLD += block.attention.decode(normed_BLD, rope, attend)
        normed_BLD = block.ffn_norm(x_BLD)
        if isinstance(block.ffn, MoE):
            assert experts is not None
            x_BLD += block.ffn.decode(normed_BLD, experts)
        else:
            x_BLD += block.ffn(normed_BLD)
    return model.norm(x_BLD), _constrained(model.layout, LatentCache(c_kv_NBSC, k_rope_NBSR))
