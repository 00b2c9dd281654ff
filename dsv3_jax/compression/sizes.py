"""Bytes of a compressed model, and those that decoding a token reads, from configuration and profile alone; allocates nothing.

Counted are codes, scales and zero points of linear layers, everything else in 16 bits (the router's bias in 32): the arrays of
a compressed checkpoint and, within a percent, of its exports. Files repeat what they must: GGUF has a scale for every 32
weights whatever the group.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

from dsv3_jax.compression.profile import Profile, is_routed
from dsv3_jax.compression.prune import kept_experts, pruned_config
from dsv3_jax.config import ModelConfig
from dsv3_jax.interop.arrays import abstract_variables
from dsv3_jax.interop.hf_formats import usual_dtype
from dsv3_jax.interop.hf_tensors import examples
from dsv3_jax.interop.safetensors_file import DTYPES
from pallas_kernels.integer_weight import IntegerFormat

_FP8_BLOCK = 128  # inputs, and outputs, that share a scale in released checkpoints


@dataclass(frozen=True)
class Weight:
    """An array of the model: `copies` matrices [inputs, outputs], of layers or experts or both.

    What is no linear layer's has one input. `bytes` are those of a number that is not compressed.
    """

    name: str
    linear: bool
    copies: int
    inputs: int
    outputs: int
    bytes: int

    @property
    def size(self) -> int:
        return self.copies * self.inputs * self.outputs


@functools.cache
def weights_of(config: ModelConfig) -> tuple[Weight, ...]:
    """All arrays of a model, MTP modules included."""
    example_of, found = examples(config), []
    for name, variable in abstract_variables(config).items():
        shape, s = variable.get_value().shape, example_of[name]
        number = DTYPES[usual_dtype(s, "hf-bf16")].itemsize
        lead = next(axis for axis, i in enumerate(s.full_index) if isinstance(i, slice)) if s.is_fp8 else 0
        cut = lead + s.inputs if s.is_fp8 else 0
        copies, inputs, outputs = (math.prod(part) for part in (shape[:lead], shape[lead:cut], shape[cut:]))
        found.append(Weight(name, s.is_fp8, copies, inputs, outputs, number))
    return tuple(found)


type BytesOf = Callable[[Weight], float]


def plain_bytes(w: Weight) -> float:
    """Bytes of a weight in bfloat16, as an `hf-bf16` export has it."""
    return w.size * w.bytes


def fp8_bytes(w: Weight) -> float:
    """Bytes of a weight as DeepSeek released it: linear layers in 8 bits, a float32 scale for each 128 x 128."""
    blocks = math.ceil(w.inputs / _FP8_BLOCK) * math.ceil(w.outputs / _FP8_BLOCK)
    return w.size + w.copies * blocks * 4 if w.linear else plain_bytes(w)


def profile_bytes(profile: Profile) -> BytesOf:
    """The function that says the bytes of a weight in a profile's formats."""

    def bytes_of(w: Weight) -> float:
        format = profile.format_of(w.name) if w.linear else None
        if isinstance(format, IntegerFormat):
            return w.size * format.of(w.inputs).bits_per_weight() / 8
        return plain_bytes(w) if format is None else fp8_bytes(w)

    return bytes_of


def kv_b_plain(bytes_of: BytesOf) -> BytesOf:
    """`bytes_of` for a server that multiplies kv_b into queries and outputs, which it does in bfloat16 (vLLM)."""
    return lambda w: plain_bytes(w) if w.name.endswith("w_kv_b_CHX") else bytes_of(w)


@dataclass(frozen=True)
class Size:
    """Bytes of the main model and of its MTP modules, and those of the main model's weights that decoding one token reads."""

    main: float
    mtp: float
    read: float


def size_of(config: ModelConfig, bytes_of: BytesOf) -> Size:
    """The sizes of a model whose weights have these bytes.

    A token reads each weight of the main model once, of routed experts its own; of the embedding a row, which is not counted.
    That is for one sequence: a batch shares all but the experts.
    """
    main = mtp = read = 0.0
    for w in weights_of(config):
        stored = bytes_of(w)
        if w.name.startswith("mtp/"):
            mtp += stored
            continue
        main += stored
        if is_routed(w.name):
            read += stored * config.num_experts_per_tok / config.n_routed_experts
        elif w.name != "embed_VD" or config.tie_word_embeddings:
            read += stored
    return Size(main, mtp, read)


def compressed_size(config: ModelConfig, profile: Profile) -> Size:
    """The sizes of a model that was compressed by a profile, without the experts that it drops. Raises as `check_fits`."""
    return size_of(pruned_config(config, kept_experts(config, profile.prune.fraction)), profile_bytes(profile))


def decode_rate(size: Size, gb_s: float) -> float:
    """Tokens a second of one sequence if reading weights were all, from memory of `gb_s` 10^9 bytes a second."""
    return gb_s * 1e9 / size.read
