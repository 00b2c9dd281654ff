"""The model as a server's steps read it: layers one by one, in the dtype of their products, with a paged latent cache.

A cache's page holds the latents of PAGE neighbouring positions of one sequence, or of several that begin with the same text;
a table says which pages a sequence has. A page's number is the same in every layer, the MTP module's one included.
Page 0 belongs to nobody: what is no token of a sequence is written there. On a mesh every device has pages of its own, numbered
from 0, and as many of a step's sequences as any other.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.model.attention import Absorbed, RopeTable
from dsv3_jax.model.layers import Linear, linear, swiglu
from dsv3_jax.model.layout import Layout
from dsv3_jax.model.moe import MoE, RoutedExperts
from dsv3_jax.model.parameters import EMBEDDING, HEAD, ROUTED_EXPERTS, is_float32
from dsv3_jax.model.rope import attention_scale, rope_table
from dsv3_jax.model.transformer import Block, MTPModule, Transformer
from dsv3_jax.serve.attend import PAGE, LayerPages, over_pages
from pallas_kernels import grouped_swiglu, integer_experts
from pallas_kernels.integer_weight import IntegerWeight
from pallas_kernels.products import dot, dot_general

_GATE_UP_AXES = ("experts", None, "moe_ffn")


class Tokens(NamedTuple):
    """Neighbouring tokens of B sequences, and where they and those before them lie in the cache.

    What is not `real` may have any position.
    """

    position_BL: Int[Array, "B L"]
    real_BL: Bool[Array, "B L"]
    page_BP: Int[Array, "B P"]  # the sequence's pages in order; 0: none there yet


class Decoder(nnx.Module):
    """A model taken apart once, so that no step moves or converts a weight.

    On a mesh all devices have all tokens, and what they meet is split among them. The sequences' pages are split, too:
    attention runs where they are, between two exchanges of a few numbers a head.
    """

    def __init__(self, model: Transformer):
        self.config, self.layout, self.dtype = model.config, model.layout.decoding, model.dtype
        self.embed_VD = nnx.Param(model.embed_VD.astype(model.dtype), logical_axes=("vocab_in", "embed_in"), kind=EMBEDDING)
        self.layers = nnx.List([block for blocks in (model.dense_blocks, model.moe_blocks) for block in _one_by_one(blocks)])
        self.norm = model.norm
        self.head_DV = nnx.Param(model.head_weight().astype(model.dtype), logical_axes=("embed", "vocab"), kind=HEAD)
        self.mtp = nnx.List([*model.mtp[:1]])
        for block in (*self.layers, *(module.block for module in self.mtp)):
            block.attention.absorb(model.dtype)
            if isinstance(block.ffn, MoE):
                _make_matrices(block.ffn, self.layout)
        for _, node in nnx.iter_graph(self):
            if isinstance(node, nnx.Variable):
                _as_read(node, model.dtype, self.layout)
                continue
            if hasattr(node, "layout"):
                node.layout = self.layout
            if isinstance(getattr(node, "linear", None), Linear):
                node.linear = Product(self.layout)

    def empty_pages(self, pages: int) -> list[LayerPages]:
        """A cache of zeros: the pages, of all devices together, of each layer, the MTP module's last."""

        def zeros(size: int) -> Array:
            return self.layout.constrain(jnp.zeros((pages, PAGE, size), self.dtype), "cache_batch", None, None)

        count = len(self.layers) + len(self.mtp)
        return [LayerPages(zeros(self.config.kv_lora_rank), zeros(self.config.qk_rope_head_dim)) for _ in range(count)]

    def hidden(
        self, pages: list[LayerPages], token_BL: Int[Array, "B L"], tokens: Tokens
    ) -> tuple[Float[Array, "B L D"], list[LayerPages]]:
        """Final hidden states, normalised for the head, and the cache with these tokens."""
        pages, rope = [*pages], rope_table(self.config, tokens.position_BL)
        x_BLD = self._embed(token_BL)
        for i, block in enumerate(self.layers):
            x_BLD, pages[i] = _run(block, x_BLD, rope, pages[i], tokens)
        return self.norm(x_BLD), pages

    def mtp_hidden(
        self, pages: list[LayerPages], hidden_BLD: Array, next_BL: Int[Array, "B L"], tokens: Tokens
    ) -> tuple[Float[Array, "B L D"], list[LayerPages]]:
        """The same of the MTP module: what its head predicts is the token after `next_BL`, the one after each place."""
        module: MTPModule = self.mtp[0]
        x_BLD = module.joined(hidden_BLD, self._embed(next_BL))
        x_BLD, last = _run(module.block, x_BLD, rope_table(self.config, tokens.position_BL), pages[-1], tokens)
        return module.norm(x_BLD), [*pages[:-1], last]

    def _embed(self, token_BL: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        return self.layout.constrain(self.layout.embed(self.embed_VD[...], token_BL, self.dtype), None, None, None)

    def logits(self, hidden_TD: Float[Array, "T D"]) -> Float[Array, "T V"]:
        return self.layout.constrain(dot(hidden_TD, self.head_DV[...], dtype=jnp.float32), None, "vocab")


class Product(Linear):
    """A product without a gradient: w's axes are not made one, which would bring together what a mesh keeps apart."""

    def __init__(self, layout: Layout):
        self.gemms, self.layout, self.switch = None, layout, None

    def __call__(self, x: Array, w: Array | IntegerWeight, *axes: str | None) -> Array:
        operand = swiglu(x) if x.ndim == 4 else x
        if isinstance(w, IntegerWeight):
            return linear(operand, w)
        return dot_general(operand, w, (((operand.ndim - 1,), (0,)), ((), ())))


def take_apart(model: Transformer) -> tuple[nnx.GraphDef[Decoder], nnx.State]:
    """The decoder of a model, as `nnx.merge` takes it; the state's arrays are new ones."""
    graph, state = nnx.split(model)
    return _taken_apart(graph, state)


def abstractly_apart(model: Transformer) -> tuple[nnx.GraphDef[Decoder], nnx.State]:
    """What `take_apart` would give of an abstract model on a mesh: shapes, dtypes, and where each array would lie."""
    graph, state = jax.eval_shape(functools.partial(_taken_apart, *nnx.split(model)[:1]), nnx.split(model)[1])
    layout = model.layout.decoding

    def placed(variable: nnx.Variable) -> nnx.Variable:
        value, axes = variable.get_value(), variable.get_metadata("logical_axes")
        axes = ("heads", None, None) if isinstance(value, Absorbed) else axes
        return variable.replace(
            jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=layout.place(a.shape, *axes)), value)
        )

    return graph, jax.tree.map(placed, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


@functools.partial(jax.jit, static_argnums=0)
def _taken_apart(graph: nnx.GraphDef[Transformer], state: nnx.State):
    return nnx.split(Decoder(nnx.merge(graph, state)))


def _one_by_one(blocks: Block | None) -> list[Block]:
    if blocks is None:
        return []
    graph, state = nnx.split(blocks)
    return [nnx.merge(graph, jax.tree.map(lambda a, i=i: a[i], state)) for i in range(blocks.attention_norm.scale.shape[0])]


def _as_read(variable: nnx.Variable, dtype: jnp.dtype, layout: Layout) -> None:
    """Give a weight the dtype and the place in which steps read it."""
    value, axes = variable.get_value(), variable.get_metadata("logical_axes")
    if isinstance(value, IntegerWeight):
        variable.set_value(value.side_by_side())
    elif isinstance(value, Absorbed):
        variable.set_value(Absorbed(*(layout.constrain(w, "heads", None, None) for w in value)))
    else:
        value = value if is_float32(variable) else value.astype(dtype)
        variable.set_value(layout.constrain(value, *axes))


def _make_matrices(moe: MoE, layout: Layout) -> None:
    """Experts' gates and what passes them side by side, for each device's part: a TPU's tiles make it a copy of both."""
    w_gate_up_ED2M = moe.w_gate_up_ED2M.get_value()
    if not isinstance(w_gate_up_ED2M, IntegerWeight):
        (E, D, _, M), parts = w_gate_up_ED2M.shape, layout.shards("moe_ffn")
        w_gate_up_EDX = w_gate_up_ED2M.reshape(E, D, 2, parts, M // parts).swapaxes(2, 3).reshape(E, D, 2 * M)
        moe.w_gate_up_ED2M = nnx.Param(w_gate_up_EDX, logical_axes=_GATE_UP_AXES, kind=ROUTED_EXPERTS)


def _routed(moe: MoE) -> RoutedExperts:
    weights = moe.w_gate_up_ED2M[...], moe.w_down_EMD[...]
    down_axes = ("experts", "moe_ffn", None)
    if isinstance(weights[0], IntegerWeight):
        axes = ("experts", None, None, "moe_ffn"), down_axes
        return functools.partial(moe.layout.held_experts, _held_integers, weights, axes)
    return functools.partial(moe.layout.held_experts, _held, weights, (_GATE_UP_AXES, down_axes))


def _held_integers(w_gate_up_ED2M, w_down_EMD, x_TD, expert_TK, weight_TK):
    return integer_experts(x_TD, w_gate_up_ED2M, w_down_EMD, expert_TK, weight_TK)


def _held(w_gate_up_EDX, w_down_EMD, x_TD, expert_TK, weight_TK):
    E, D, _ = w_gate_up_EDX.shape
    return grouped_swiglu(x_TD, w_gate_up_EDX.reshape(E, D, 2, -1), w_down_EMD, expert_TK, weight_TK)


def _run(block: Block, x_BLD: Array, rope: RopeTable, pages: LayerPages, tokens: Tokens) -> tuple[Array, LayerPages]:
    """x through a block, and the block's pages with x's latents."""
    normed_BLD = block.attention_norm(x_BLD)
    layout, here = block.attention.layout, block.attention.layout.spec("cache_batch")
    latents = tuple(layout.constrain(a, "cache_batch", None, None) for a in block.attention.latents(normed_BLD, rope))
    pages = layout.on_each_device(_written, (here, here, here), here)(pages, latents, tokens)

    def attend(*queries: Array) -> Array:
        # in two steps, or XLA would rather move the weights that made the queries
        queries = tuple(layout.constrain(q, None, None, "heads", None) for q in queries)
        queries = tuple(layout.constrain(q, "cache_batch", None, None, None) for q in queries)
        local = functools.partial(over_pages, scale=attention_scale(block.attention.config))
        where = pages, tokens.page_BP, tokens.position_BL
        return layout.constrain(layout.on_each_device(local, here, here)(*queries, *where), None, None, "heads", None)

    x_BLD = layout.constrain(x_BLD + block.attention.decode(normed_BLD, rope, attend), None, None, None)
    normed_BLD = block.ffn_norm(x_BLD)
    ffn = block.ffn
    return x_BLD + (ffn.decode(normed_BLD, _routed(ffn)) if isinstance(ffn, MoE) else ffn(normed_BLD)), pages


def _written(pages: LayerPages, latents: tuple[Array, Array], tokens: Tokens) -> LayerPages:
    index_BL = jnp.minimum(tokens.position_BL // PAGE, tokens.page_BP.shape[1] - 1)
    page_BL = jnp.where(tokens.real_BL, jnp.take_along_axis(tokens.page_BP, index_BL, axis=1), 0)
    place_BL = tokens.position_BL % PAGE
    return LayerPages(*(a.at[page_BL, place_BL].set(new) for a, new in zip(pages, latents, strict=True)))
