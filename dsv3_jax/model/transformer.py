"""The DeepSeek-V3 decoder (arXiv 2412.19437, section 2): embedding, dense layers, MoE layers, head, MTP modules.

Layers of a kind are one module whose parameters carry a leading layer axis, applied by `jax.lax.scan`: the compiled
program, and the time to compile it, do not grow with depth.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.attention import LATENTS, Attention, RopeTable
from dsv3_jax.model.layers import FFN_GATE_UP, RMSNorm, SwiGLU, linear
from dsv3_jax.model.layout import Layout
from dsv3_jax.model.moe import MoE, RouterStats
from dsv3_jax.model.parameters import DENSE_FFN, EMBEDDING, HEAD, PROJECTION, weight
from dsv3_jax.model.rope import rope_table
from dsv3_jax.model.router import ROUTING, Router
from dsv3_jax.precision.recipes import RECIPES, Recipe
from pallas_kernels.causal_attention.blockwise import RESIDUALS as ATTENTION
from pallas_kernels.grouped_swiglu.blocked import RESIDUALS as EXPERTS
from pallas_kernels.products import dot
from pallas_kernels.scaled_linear.products import RESIDUALS as SCALED_SWIGLU

MIDDLE = "block_middle"  # checkpoint_name of a block's residual stream between attention and feed-forward
# What `selective` keeps of a layer besides its input. Norms, rotations, MLA up-projections and SwiGLU are recomputed
# (section 3.2.3): they cost little, and their results are most of the bytes.
_KEPT = (LATENTS, ATTENTION, MIDDLE, ROUTING, FFN_GATE_UP, SCALED_SWIGLU, EXPERTS)


def _all_but_gathered(primitive, *_, **__) -> bool:
    """Keep every intermediate but what a sharding constraint made: a gathered weight kept for each layer is all of them."""
    return primitive.name != "sharding_constraint"


# The policy with which a layer's body is checkpointed (see RematConfig); `sqrt` checkpoints groups of layers besides.
_POLICIES: dict[str, Callable[..., bool] | None] = {
    "none": _all_but_gathered,
    "full": None,
    "selective": jax.checkpoint_policies.save_only_these_names(*_KEPT),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[ROUTING], names_which_can_be_offloaded=[n for n in _KEPT if n != ROUTING],
        offload_src="device", offload_dst="pinned_host",
    ),
    "sqrt": None,
}  # fmt: skip


class Block(nnx.Module):
    """Pre-norm residual block: MLA, then a dense or an MoE feed-forward layer."""

    def __init__(self, config: ModelConfig, moe: bool, layout: Layout, recipe: Recipe, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, layout, recipe, rngs)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if moe:
            self.ffn = MoE(config, layout, recipe, rngs)
        else:
            self.ffn = SwiGLU(config, config.intermediate_size, DENSE_FFN, layout, recipe, rngs)

    def __call__(self, x_BLD: Array, segment_BL: Array, rope: RopeTable) -> tuple[Array, RouterStats | None]:
        with jax.named_scope("attention"):
            x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD), segment_BL, rope)
            x_BLD = checkpoint_name(x_BLD, MIDDLE)
        with jax.named_scope("ffn"):
            normed_BLD = self.ffn_norm(x_BLD)
            if isinstance(self.ffn, MoE):
                y_BLD, stats = self.ffn(normed_BLD, segment_BL >= 0)
                return x_BLD + y_BLD, stats
            return x_BLD + self.ffn(normed_BLD), None


def stacked_blocks(config: ModelConfig, moe: bool, layers: int, layout: Layout, recipe: Recipe, rngs: nnx.Rngs) -> Block | None:
    """`layers` blocks in one module with a leading layer axis on every parameter, or None for no layers."""
    if layers == 0:
        return None
    make = nnx.vmap(lambda rngs: Block(config, moe, layout, recipe, rngs), axis_size=layers)
    return nnx.split_rngs(splits=layers)(make)(rngs)


class MTPModule(nnx.Module):
    """One multi-token-prediction module (section 2.2, equations 21-23); embedding and head are the main model's.

    What it reads of the main model is the state *after* the final norm, and of another module the state after that one's norm:
    what the head reads, too. The report does not say which, and some systems train with the state before. This is the one that
    serving systems hand to the released module when they draft with it. The two differ by the norm's scale alone, because
    `hidden_norm` comes next; weights that were trained on the other state predict worse here.
    """

    def __init__(self, config: ModelConfig, layout: Layout, recipe: Recipe, rngs: nnx.Rngs):
        D = config.hidden_size
        self.embed_norm = RMSNorm(D, config.rms_norm_eps)
        self.hidden_norm = RMSNorm(D, config.rms_norm_eps)
        self.w_XD = weight(rngs, config.initializer_range, PROJECTION, embed_and_hidden=2 * D, embed=D)
        self.block = Block(config, True, layout, recipe, rngs)
        self.norm = RMSNorm(D, config.rms_norm_eps)

    def __call__(
        self, hidden_BLD: Array, embedding_BLD: Array, segment_BL: Array, rope: RopeTable
    ) -> tuple[Float[Array, "B L D"], RouterStats | None]:
        """The hidden states of depth k, normalised for the head, from those of depth k-1 and the embeddings of t_{i+k}."""
        x_BLD, stats = self.block(self.joined(hidden_BLD, embedding_BLD), segment_BL, rope)
        return self.norm(x_BLD), stats

    def joined(self, hidden_BLD: Array, embedding_BLD: Array) -> Float[Array, "B L D"]:
        """Equation 21: what enters the block."""
        joined_BLX = jnp.concatenate([self.embed_norm(embedding_BLD), self.hidden_norm(hidden_BLD)], axis=-1)
        return linear(joined_BLX, self.w_XD[...])


def positions(segment_BL: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """Index of each token within its segment."""
    index_L = jnp.arange(segment_BL.shape[1])
    begins_BL = jnp.pad(segment_BL[:, 1:] != segment_BL[:, :-1], ((0, 0), (1, 0)))
    return index_L - jax.lax.cummax(jnp.where(begins_BL, index_L, 0), axis=1)


class Transformer(nnx.Module):
    """`recipe` says in which formats products run; parameters are float32. `remat` is what the backward pass recomputes.

    `layout` says where arrays live, and its `outside_pipeline` where those of embedding, dense layers, head and MTP modules do.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        recipe: Recipe = RECIPES["float32"],
        remat: str = "none",
        layout: Layout = Layout(),  # noqa: B008  (immutable)
        rngs: nnx.Rngs,
    ):
        self.config, self.dtype, self.remat, self.layout = config, jnp.dtype(recipe.dtype), remat, layout
        self.core = recipe.core
        V, D, std = config.vocab_size, config.hidden_size, config.initializer_range
        self.embed_VD = weight(rngs, std, EMBEDDING, vocab_in=V, embed_in=D)
        self.dense_blocks = stacked_blocks(config, False, config.num_dense_layers, layout.outside_pipeline, recipe, rngs)
        self.moe_blocks = stacked_blocks(config, True, config.num_moe_layers, layout, recipe, rngs)
        self.norm = RMSNorm(D, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.head_DV = weight(rngs, std, HEAD, embed=D, vocab=V)
        depths = range(config.num_nextn_predict_layers)
        self.mtp = nnx.List([MTPModule(config, layout.outside_pipeline, recipe, rngs) for _ in depths])

    @property
    def routers(self) -> list[Router]:
        """The routers, in the order in which statistics come: that of the stacked MoE layers, then each MTP module's."""
        blocks = [block for block in (self.moe_blocks, *(module.block for module in self.mtp)) if block is not None]
        return [block.ffn.router for block in blocks]  # type: ignore[union-attr]

    def embed(self, token_BL: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        return self.layout.outside_pipeline.embed(self.embed_VD[...], token_BL, self.dtype)

    def head_weight(self) -> Float[Array, "D V"]:
        return self.embed_VD[...].T if self.config.tie_word_embeddings else self.head_DV[...]

    def first(self, token_BL: Int[Array, "B L"], segment_BL: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """What enters the MoE layers: embeddings through the dense layers."""
        x_BLD = self.layout.outside_pipeline.constrain(self.embed(token_BL), "batch", "sequence", None)
        if self.dense_blocks is not None:
            x_BLD, _ = self.run(self.dense_blocks, x_BLD, segment_BL)
        return x_BLD

    def hidden(
        self, token_BL: Int[Array, "B L"], segment_BL: Int[Array, "B L"]
    ) -> tuple[Float[Array, "B L D"], list[RouterStats]]:
        """Final hidden states, normalised for the head, and router statistics with a leading layer axis."""
        x_BLD, stats = self.first(token_BL, segment_BL), []
        if self.moe_blocks is not None:
            x_BLD, layer_stats = self.run(self.moe_blocks, x_BLD, segment_BL)
            stats.append(layer_stats)
        return self.norm(x_BLD), stats

    def mtp_hidden(
        self, depth: int, hidden_BLD: Array, token_BL: Int[Array, "B L"], segment_BL: Int[Array, "B L"]
    ) -> tuple[Float[Array, "B L D"], RouterStats]:
        """Hidden states of MTP module `depth` (from 0), normalised for the head, from those of the module before.

        `token_BL` holds t_{i+depth+1} at position i, `segment_BL` the segment of position i.
        """
        rope = rope_table(self.config, positions(segment_BL))
        graph, state = nnx.split(self.mtp[depth])

        def body(hidden_BLD, state):
            module = nnx.merge(graph, self.layout.outside_pipeline.gather(state, self.dtype))
            return module(hidden_BLD, self.embed(token_BL), segment_BL, rope)

        x_BLD, stats = self._rematerialised(body)(hidden_BLD, state)
        return x_BLD, jax.tree.map(lambda a: a[None], stats)

    def run(self, blocks: Block, x_BLD: Array, segment_BL: Array, live_N: Array | None = None):
        """x through stacked blocks, and their statistics; layers that are not `live` pass it on unchanged."""
        rope = rope_table(self.config, positions(segment_BL))
        graph, layers = nnx.split(blocks)
        layout = self.layout if isinstance(blocks.ffn, MoE) else self.layout.outside_pipeline

        def body(x_BLD, layer):
            layer, live = layer
            block = nnx.merge(graph, layout.gather(layer, self.dtype))
            y_BLD, stats = block(x_BLD, segment_BL, rope)
            return (y_BLD if live is None else jnp.where(live, y_BLD, x_BLD)), stats

        scanned = (layers, live_N)
        if self.remat == "sqrt":
            return _two_level_scan(jax.checkpoint(body), x_BLD, scanned)
        return jax.lax.scan(self._rematerialised(body), x_BLD, scanned)

    def _rematerialised(self, body: Callable) -> Callable:
        if self.remat == "none" and self.layout == Layout():
            return body
        return jax.checkpoint(body, policy=_POLICIES[self.remat])

    def __call__(self, token_BL: Int[Array, "B L"]) -> Float[Array, "B L V"]:
        """Next-token logits, float32; every row is one segment. Compiled once per shape."""
        graph, state = nnx.split(self)
        return _logits(graph, state, jnp.asarray(token_BL))


@functools.partial(jax.jit, static_argnums=0)
def _logits(graph: nnx.GraphDef[Transformer], state: nnx.State, token_BL: Array) -> Array:
    model = nnx.merge(graph, state)
    x_BLD, _ = model.hidden(token_BL, jnp.zeros_like(token_BL))
    return dot(x_BLD, model.head_weight().astype(model.dtype), dtype=jnp.float32)


def _two_level_scan(body: Callable, carry: Array, layers):
    """`lax.scan` in groups of about sqrt(N) layers, of which only the inputs are kept: O(sqrt N) activations."""
    N = jax.tree.leaves(layers)[0].shape[0]
    size = max(round(math.sqrt(N)), 1)
    grouped_layers = N // size * size

    def group(carry, layers):
        return jax.lax.scan(body, carry, layers)

    def grouped(a):
        a = a if grouped_layers == N else a[:grouped_layers]  # a slice, even of everything, would cost a copy of the gradients
        return a.reshape(-1, size, *a.shape[1:])

    groups = jax.tree.map(grouped, layers)
    carry, stats = jax.lax.scan(jax.checkpoint(group), carry, groups)
    stats = jax.tree.map(lambda a: a.reshape(grouped_layers, *a.shape[2:]), stats)
    if grouped_layers == N:
        return carry, stats
    carry, rest = jax.checkpoint(group)(carry, jax.tree.map(lambda a: a[grouped_layers:], layers))
    return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), stats, rest)
