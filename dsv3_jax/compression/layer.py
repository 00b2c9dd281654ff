"""Compresses the linear layers of one block, stage by stage, and passes the calibration set on through the result."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.compression.blocks import Inputs, Stage, attention_stages, ffn_stages
from dsv3_jax.compression.experts import (
    add_moments,
    expert_energies,
    expert_mesh,
    gptq_experts,
    no_moments,
    replicated,
    sharded,
)
from dsv3_jax.compression.gptq import Rounded, add_products, gptq, output_energies, round_to_nearest
from dsv3_jax.compression.profile import DOWN, GATE_UP, Profile
from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import UserError
from dsv3_jax.model.moe import MoE
from dsv3_jax.model.names import variables_by_name
from dsv3_jax.model.rope import rope_table
from dsv3_jax.model.transformer import Block, positions
from pallas_kernels.integer_weight import IntegerFormat, IntegerWeight, dequantize, pack

_DAMPINGS = (1.0, 10.0, 100.0)  # times the profile's: what is tried after a factorisation that failed


@dataclass
class Stream:
    """The calibration set on its way through the model: a residual stream for each batch of windows."""

    x: list[Float[Array, "B L D"]]
    segments: list[Int[Array, "B L"]]

    def map(self, f: Callable[..., Any]) -> list:
        """f(x, segments) of every batch."""
        return [f(*arrays) for arrays in zip(self.x, self.segments, strict=True)]

    def tokens(self) -> Float[Array, "T D"]:
        """The residual stream of all tokens."""
        return jnp.concatenate([x_BLD.reshape(-1, x_BLD.shape[-1]) for x_BLD in self.x])

    def real(self) -> Bool[Array, " T"]:
        """Which tokens are no padding."""
        return jnp.concatenate([segment_BL.reshape(-1) >= 0 for segment_BL in self.segments])


@dataclass
class LayerResult:
    """What compressing a block gave: its integer weights by name, tokens of each routed expert, and what had to be retried.

    `energies` are those of `gptq.output_energies` by the weight's name, f32[3], of routed experts f32[E, 3].
    """

    block: Block  # with the weights that the integers stand for
    weights: dict[str, IntegerWeight] = field(default_factory=dict)
    tokens_E: np.ndarray | None = None
    retries: list[str] = field(default_factory=list)
    energies: dict[str, np.ndarray] = field(default_factory=dict)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _add_inputs(inputs: Inputs, graph: nnx.GraphDef, state: nnx.State, xx_KK, x_BLD, segment_BL):
    """Second moments with those of what a stage reads of a batch; padding does not count."""
    block = nnx.merge(graph, state)
    read = inputs(block, x_BLD, segment_BL, _rope(block, segment_BL))
    return add_products(xx_KK, jnp.where((segment_BL >= 0).reshape(-1, 1), read.reshape(segment_BL.size, -1), 0))


def _rope(block: Block, segment_BL: Array):
    return rope_table(block.attention.config, positions(segment_BL))


@partial(jax.jit, static_argnums=0)
def _middle(graph: nnx.GraphDef, state: nnx.State, x_BLD, segment_BL):
    """The residual stream between attention and feed-forward."""
    block = nnx.merge(graph, state)
    return x_BLD + block.attention(block.attention_norm(x_BLD), segment_BL, _rope(block, segment_BL))


@partial(jax.jit, static_argnums=0)
def _routed(graph: nnx.GraphDef, state: nnx.State, middle_BLD, segment_BL):
    """What the routed experts read, [T, D], and which of them each token goes to, [T, K]; padding to none."""
    block = nnx.merge(graph, state)
    normed_BLD = block.ffn_norm(middle_BLD)
    expert_BLK, _ = block.ffn.router.choose(block.ffn.router.scores(normed_BLD))
    E, K = block.ffn.config.n_routed_experts, expert_BLK.shape[-1]
    expert_BLK = jnp.where(segment_BL[..., None] >= 0, expert_BLK, E)
    return normed_BLD.reshape(segment_BL.size, -1), expert_BLK.reshape(-1, K)


@partial(jax.jit, static_argnums=0)
def _after(graph: nnx.GraphDef, state: nnx.State, middle_BLD, segment_BL):
    """The residual stream after the block."""
    block = nnx.merge(graph, state)
    normed_BLD = block.ffn_norm(middle_BLD)
    if isinstance(block.ffn, MoE):
        return middle_BLD + block.ffn(normed_BLD, segment_BL >= 0)[0]
    return middle_BLD + block.ffn(normed_BLD)


def run_attention(block: Block, stream: Stream) -> Stream:
    """The stream between attention and feed-forward of a block with dense weights."""
    return Stream(stream.map(partial(_middle, *nnx.split(block))), stream.segments)


def run_ffn(block: Block, middle: Stream) -> Stream:
    """The stream after a block, from that between attention and feed-forward."""
    return Stream(middle.map(partial(_after, *nnx.split(block))), middle.segments)


_round_one = jax.jit(gptq, static_argnums=2)
_energies = jax.jit(output_energies, static_argnums=3)
_nearest = jax.jit(round_to_nearest, static_argnums=1)
_nearest_experts = jax.jit(jax.vmap(round_to_nearest, in_axes=(0, None)), static_argnums=1)


class LayerCompressor:
    """Compresses blocks by a profile. One object serves all blocks of a model, so that each kind is compiled once."""

    def __init__(self, config: ModelConfig, profile: Profile):
        self._config, self._profile = config, profile

    def __call__(
        self, block: Block, stream: Stream, where: str, before_ffn: Callable[[Block, Stream], Block] = lambda block, _: block
    ) -> tuple[LayerResult, Stream]:
        """Compress a block, whose weights become those that the codes stand for.

        Args:
            block: With dense weights.
            stream: What enters it.
            where: Its name in errors.
            before_ffn: Gives the block whose feed-forward part is compressed, from the one whose attention is, and the stream
                between the two.

        Returns:
            The block with its integer weights, and the stream after it.
        """
        result = LayerResult(block)
        for stage in attention_stages(self._config):
            self._stage(block, stage, stream, result, where)
        middle = run_attention(block, stream)
        block = result.block = before_ffn(block, middle)
        moe = isinstance(block.ffn, MoE)
        for stage in ffn_stages(moe):
            self._stage(block, stage, middle, result, where)
        if moe:
            self._experts(block, middle, result, where)
        return result, run_ffn(block, middle)

    def _stage(self, block: Block, stage: Stage, stream: Stream, result: LayerResult, where: str) -> None:
        format = self._profile.integer_format_of(stage.weights[0])
        if format is None:
            return
        variables = variables_by_name(nnx.state(block))
        graph, state = nnx.split(block)
        matrices = {name: as_matrix(variables[name].get_value(), name) for name in stage.weights}
        K = next(iter(matrices.values())).shape[0]
        xx_KK = jnp.zeros((K, K), jnp.float32)
        if self._profile.method == "gptq":
            for x_BLD, segment_BL in zip(stream.x, stream.segments, strict=True):
                xx_KK = _add_inputs(stage.inputs, graph, state, xx_KK, x_BLD, segment_BL)
        of = format.of(K)
        for name, w_KN in matrices.items():
            by_gptq = partial(_round_one, w_KN, xx_KK, of)
            rounded = self._retried(f"{where}, {name}", result, by_gptq, partial(_nearest, w_KN, of))
            if self._profile.method == "gptq":
                result.energies[name] = np.asarray(_energies(w_KN, rounded, xx_KK, of))
            self._put(variables[name], name, rounded, of, result)

    def _experts(self, block: Block, middle: Stream, result: LayerResult, where: str) -> None:
        """The routed experts, gate and up before down. What each expert reads decides its codes."""
        format = self._profile.integer_format_of(GATE_UP)
        reads = middle.map(partial(_routed, *nnx.split(block)))
        variables = variables_by_name(nnx.state(block))
        E = variables[DOWN].get_value().shape[0]
        choices = np.concatenate([np.asarray(expert_TK).reshape(-1) for _, expert_TK in reads])
        result.tokens_E = np.bincount(choices, minlength=E + 1)[:E]  # and those of padding, which E stands for
        if format is None:
            return
        mesh = expert_mesh(E)
        for name in (GATE_UP, DOWN):
            w = variables[name].get_value()
            K = w.shape[1]
            weights = () if name == GATE_UP else (sharded(mesh, variables[GATE_UP].get_value()),)
            moments = no_moments(mesh, E, K)
            for x_TD, expert_TK in reads:
                moments = add_moments(mesh, moments, replicated(mesh, x_TD), replicated(mesh, expert_TK), *weights)
            of, w_EKN = format.of(K), w.reshape(E, K, -1)
            by_gptq = partial(gptq_experts, mesh, w_EKN, moments, of)
            rounded = self._retried(f"{where}, {name}", result, by_gptq, partial(_nearest_experts, w_EKN, of))
            result.energies[name] = np.asarray(expert_energies(mesh, *sharded(mesh, (w_EKN, rounded)), moments, of))
            rounded = jax.device_put(rounded, jax.devices()[0])
            self._put(variables[name], name, rounded, of, result)

    def _retried(
        self, what: str, result: LayerResult, by_gptq: Callable[[float], Rounded], by_rounding: Callable[[], Rounded]
    ) -> Rounded:
        """GPTQ's codes, if need be with more damping, which the result then names; never silently anything else."""
        if self._profile.method == "round":
            return by_rounding()
        for times in _DAMPINGS:
            damping = self._profile.damping * times
            rounded = by_gptq(damping)
            if bool(rounded.sound.all()):
                return rounded
            result.retries.append(f"{what}: the factorisation failed with damping {damping:g}")
        raise UserError(f"{what}: the inputs' moments cannot be factorised, even with damping={damping:g}; are weights finite?")

    def _put(self, variable: nnx.Variable, name: str, rounded: Rounded, format: IntegerFormat, result: LayerResult) -> None:
        """Keep a weight's codes, and put the numbers they stand for in its place in the block."""
        weight = integer_weight(rounded, format, variable.get_value().shape, name)
        result.weights[name] = weight
        variable.set_value(dequantize(weight))


def _input_axes(name: str) -> int:
    """How many axes of a linear layer's weight are inputs."""
    return 2 if name.endswith("w_o_HUD") else 1


def as_matrix(w: Array, name: str) -> Float[Array, "K N"]:
    """A linear layer's weight with its inputs as one axis and its outputs as the other."""
    inputs = int(np.prod(w.shape[: _input_axes(name)]))
    return w.reshape(inputs, -1)


def integer_weight(rounded: Rounded, format: IntegerFormat, shape: tuple[int, ...], name: str) -> IntegerWeight:
    """Codes of a weight of this shape as they are stored."""
    lead = rounded.codes_KN.ndim - 2
    inputs = shape[lead : lead + _input_axes(name)]
    outputs = shape[lead + len(inputs) :]

    def spread(a: Array) -> Array:
        return a.reshape(*a.shape[:-1], *outputs)

    codes = pack(rounded.codes_KN, format.bits, -2)
    zero = None if format.symmetric else spread(rounded.zero_GN)
    return IntegerWeight(spread(codes), spread(rounded.scale_GN), zero, format, inputs, len(outputs))
