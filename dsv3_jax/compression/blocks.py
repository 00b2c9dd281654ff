"""One layer of a checkpoint at a time, and what each of its linear layers reads.

A layer's weights fall into stages: those of a stage read inputs that depend on no weight of the same or a later stage, so that
GPTQ sees the inputs which the weights compressed before it will give.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dsv3_jax.checkpoint.load import Checkpoint
from dsv3_jax.checkpoint.names import weight_name
from dsv3_jax.checkpoint.piecewise import StoredArrays
from dsv3_jax.config import ModelConfig
from dsv3_jax.interop.arrays import abstract_variables
from dsv3_jax.interop.hf_formats import usual_dtype
from dsv3_jax.interop.hf_tensors import sources
from dsv3_jax.model.attention import RopeTable
from dsv3_jax.model.layers import linear, swiglu
from dsv3_jax.model.layout import Layout
from dsv3_jax.model.moe import MoE
from dsv3_jax.model.names import variables_by_name
from dsv3_jax.model.transformer import Block, MTPModule
from dsv3_jax.precision.recipes import RECIPES

_RECIPE = RECIPES["float32"]


@dataclass(frozen=True)
class Place:
    """Where a block is in the model: a layer of a stack, or an MTP module (of which `layer` is the number)."""

    stack: str  # dense_blocks, moe_blocks or mtp
    layer: int
    moe: bool

    @property
    def name(self) -> str:
        """As a person would call it."""
        return f"MTP module {self.layer}" if self.stack == "mtp" else f"{self.stack.split('_')[0]} layer {self.layer}"

    @property
    def prefix(self) -> str:
        """What the names of its arrays begin with."""
        return f"mtp/{self.layer}/" if self.stack == "mtp" else f"{self.stack}/"

    @property
    def lead(self) -> tuple[int, ...]:
        """What picks the block's part out of those arrays."""
        return () if self.stack == "mtp" else (self.layer,)


def places(config: ModelConfig) -> Iterator[Place]:
    """All blocks, in the order in which a token passes them."""
    for i in range(config.num_dense_layers):
        yield Place("dense_blocks", i, False)
    for i in range(config.num_moe_layers):
        yield Place("moe_blocks", i, True)
    for k in range(config.num_nextn_predict_layers):
        yield Place("mtp", k, True)


class BlockReader:
    """Reads blocks and single arrays of a checkpoint in float32, no more than is asked for.

    `kept` arrays (all but the linear layers that released checkpoints have in 8 bits) are rounded to the dtypes of an `hf-bf16`
    export, in which compressed checkpoints keep them.
    """

    def __init__(self, checkpoint: Checkpoint):
        self.config = checkpoint.config.model
        self._stored, self._variables = StoredArrays(checkpoint.path), abstract_variables(self.config)
        self._kept_dtype = {s.array: usual_dtype(s, "hf-bf16") for s in sources(self.config) if not s.is_fp8}

    def array(self, name: str, lead: tuple[int, ...] = ()) -> np.ndarray:
        """f32 of an array, or of what `lead` picks."""
        found = self._stored[weight_name(name, self._variables[name])][lead].read().result()
        if self._kept_dtype.get(name) == "BF16":
            found = found.astype(ml_dtypes.bfloat16)
        return found.astype(np.float32)

    def size(self, place: Place) -> int:
        """Bytes of a block's parameters in float32."""
        shapes = [v.get_value().shape for name, v in self._variables.items() if name.startswith(place.prefix)]
        return sum(4 * math.prod(shape[len(place.lead) :]) for shape in shapes)

    def block(self, place: Place) -> Block | MTPModule:
        """The block, or the MTP module with its block, with its parameters on the default device."""
        return make_block(self.config, place, lambda name: self.array(name, place.lead))


def make_block(config: ModelConfig, place: Place, read: Callable[[str], np.ndarray]) -> Block | MTPModule:
    """A block, or an MTP module with its block, of what `read` gives for the names of its arrays in the model."""

    def make() -> Block | MTPModule:
        last = Layout(), _RECIPE, nnx.Rngs(0)
        return MTPModule(config, *last) if place.stack == "mtp" else Block(config, place.moe, *last)

    graph, state = nnx.split(nnx.eval_shape(make))
    for name, variable in variables_by_name(state).items():
        variable.set_value(jnp.asarray(read(place.prefix + name)))
    return nnx.merge(graph, state)


# (block, the residual stream that enters it or, for a feed-forward layer, the one after attention, segments, rope) -> inputs
Inputs = Callable[[Block, Array, Int[Array, "B L"], RopeTable], Float[Array, "B L *K"]]


@dataclass(frozen=True)
class Stage:
    """Weights of a block that read the same input, by their names in the block."""

    weights: tuple[str, ...]
    inputs: Inputs


def _normed(block: Block, x_BLD: Array, segment_BL: Array, rope: RopeTable) -> Array:
    return block.attention_norm(x_BLD)


def _query_latents(block: Block, x_BLD: Array, segment_BL: Array, rope: RopeTable) -> Array:
    return block.attention.query_latents(block.attention_norm(x_BLD))


def _latents(block: Block, x_BLD: Array, segment_BL: Array, rope: RopeTable) -> Array:
    return block.attention.latents(block.attention_norm(x_BLD), rope)[0]


def _heads(block: Block, x_BLD: Array, segment_BL: Array, rope: RopeTable) -> Array:
    return block.attention.heads(block.attention_norm(x_BLD), segment_BL, rope)


def _ffn_normed(block: Block, middle_BLD: Array, segment_BL: Array, rope: RopeTable) -> Array:
    return block.ffn_norm(middle_BLD)


def _ffn_hidden(block: Block, middle_BLD: Array, segment_BL: Array, rope: RopeTable) -> Array:
    dense = block.ffn.shared if isinstance(block.ffn, MoE) else block.ffn
    return swiglu(linear(block.ffn_norm(middle_BLD), dense.w_gate_up_D2F[...]))


def attention_stages(config: ModelConfig) -> list[Stage]:
    """The stages of a block's attention, whose inputs are functions of what enters the block."""
    first = "attention/w_q_DHX" if config.q_lora_rank is None else "attention/w_q_a_DQ"
    found = [Stage((first, "attention/w_kv_a_DX"), _normed)]
    if config.q_lora_rank is not None:
        found.append(Stage(("attention/w_q_b_QHX",), _query_latents))
    return [*found, Stage(("attention/w_kv_b_CHX",), _latents), Stage(("attention/w_o_HUD",), _heads)]


def ffn_stages(moe: bool) -> list[Stage]:
    """The stages of a dense feed-forward layer, or of shared experts: functions of the stream after attention."""
    ffn = "ffn/shared" if moe else "ffn"
    return [Stage((f"{ffn}/w_gate_up_D2F",), _ffn_normed), Stage((f"{ffn}/w_down_FD",), _ffn_hidden)]
