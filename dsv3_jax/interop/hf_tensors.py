"""Hugging Face's tensors, and the region of which of our arrays each fills.

A checkpoint is described once, as a list of `Source`s. Reading, importing, exporting, planning, and the check for missing
and unexpected tensors all follow that list.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from dsv3_jax.config import ModelConfig

Index = tuple[int | slice, ...]
_ALL = slice(None)


def halves(x: np.ndarray, R: int, axis: int) -> np.ndarray:
    """Permute an axis's last R entries from interleaved pairs (2i, 2i+1) to halves (i, i+R/2), as `model/rope.py` has it."""
    x = np.moveaxis(x, axis, -1)
    rope = x[..., -R:]
    return np.moveaxis(np.concatenate([x[..., :-R], rope[..., 0::2], rope[..., 1::2]], axis=-1), -1, axis)


def pairs(x: np.ndarray, R: int, axis: int) -> np.ndarray:
    """The inverse of `halves`."""
    x = np.moveaxis(x, axis, -1)
    rope = x[..., -R:].reshape(*x.shape[:-1], 2, R // 2).swapaxes(-1, -2).reshape(*x.shape[:-1], R)
    return np.moveaxis(np.concatenate([x[..., :-R], rope], axis=-1), -1, axis)


@dataclass(frozen=True)
class Source:
    """One tensor, and the region of one array that it fills: `array[index]` is the tensor, `split` and its axes in `order`."""

    tensor: str
    shape: tuple[int, ...]  # of the tensor
    array: str  # its name in the model's state, such as moe_blocks/attention/w_o_HUD
    split: tuple[int, ...]  # the tensor's shape with heads as an axis of their own
    order: tuple[int, ...]  # the region's axes among those of `split`
    index: Index = ()  # a layer, an expert, one of gate and up
    rope: int = 0  # entries at the end of the region's last axis that the tensor has as interleaved pairs

    @property
    def region(self) -> tuple[int, ...]:
        """Shape of `array[index]`."""
        return tuple(self.split[axis] for axis in self.order)

    @property
    def inputs(self) -> int:
        """How many of the region's axes, its first, are the inputs of a linear layer's matrix [outputs, inputs]."""
        outputs = next(n for n in range(1, len(self.split) + 1) if math.prod(self.split[:n]) == self.shape[0])
        return len(self.split) - outputs

    @property
    def full_index(self) -> Index:
        """`index`, with an entry for every axis of the array."""
        given = sum(isinstance(i, slice) for i in self.index)
        return (*self.index, *[_ALL] * (len(self.order) - given))

    @property
    def integer_index(self) -> Index:
        """`full_index` in the arrays of an `IntegerWeight`, which have one axis for all inputs."""
        first = next(axis for axis, i in enumerate(self.full_index) if isinstance(i, slice))
        return (*self.full_index[: first + 1], *self.full_index[first + self.inputs :])

    @property
    def chunk(self) -> tuple[int, ...]:
        """The region's shape with all axes of the array."""
        sizes = iter(self.region)
        return tuple(next(sizes) if isinstance(i, slice) else 1 for i in self.full_index)

    @property
    def chunk_order(self) -> tuple[int, ...]:
        """The array's axes in the order in which `split` has them: a chunk stored like this has the tensor's bytes."""
        axes = [axis for axis, i in enumerate(self.full_index) if isinstance(i, slice)]
        indexed = [axis for axis in range(len(self.full_index)) if axis not in axes]
        return (*indexed, *(axes[self.order.index(axis)] for axis in range(len(self.split))))

    @property
    def is_fp8(self) -> bool:
        """Whether released checkpoints have it in 8 bits: projections and experts, not the router, norms, head or MTP's own."""
        matrix = len(self.shape) == 2
        return matrix and (".self_attn." in self.tensor or (".mlp." in self.tensor and ".mlp.gate." not in self.tensor))

    def to_split(self, tensor: np.ndarray) -> np.ndarray:
        """The tensor, its heads apart and its rotated entries as halves. A view where nothing is rotated."""
        x = tensor.reshape(self.split)
        return halves(x, self.rope, self.order[-1]) if self.rope else x

    def to_region(self, tensor: np.ndarray, part: tuple[slice, ...] = ()) -> np.ndarray:
        """The region, or a part of it; of a mapped file, only the part's pages are read."""
        region = tensor.reshape(self.split).transpose(self.order)
        assert not self.rope or part[len(self.order) - 1 :] in ((), (_ALL,)), "rotated heads are not split"
        return halves(region[part], self.rope, -1) if self.rope else region[part]

    def from_split(self, x: np.ndarray) -> np.ndarray:
        """The inverse of `to_split`."""
        return (pairs(x, self.rope, self.order[-1]) if self.rope else x).reshape(self.shape)

    def to_tensor(self, region: np.ndarray) -> np.ndarray:
        """The inverse of `to_region`."""
        return self.from_split(region.transpose(np.argsort(self.order)))


@dataclass(frozen=True)
class Copy:
    """A tensor that repeats another one, which the model shares."""

    tensor: str
    of: str
    shape: tuple[int, ...]
    optional: bool = True  # whether a checkpoint may leave it out


def _vector(tensor: str, size: int, array: str, rope: int = 0) -> Source:
    return Source(tensor, (size,), array, (size,), (0,), rope=rope)


def _linear(tensor: str, array: str, outputs: int | tuple[int, ...], inputs: int, index: Index = (), rope: int = 0) -> Source:
    """[outputs, inputs] as inputs first; outputs may be heads and what each has."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    order = (len(outputs), *range(len(outputs)))
    return Source(tensor, (math.prod(outputs), inputs), array, (*outputs, inputs), order, index, rope)


def _attention(c: ModelConfig) -> Iterator[Source]:
    D, H, C, Q, X = c.hidden_size, c.num_attention_heads, c.kv_lora_rank, c.q_lora_rank, c.qk_head_dim
    R, N, U = c.qk_rope_head_dim, c.qk_nope_head_dim, c.v_head_dim
    at, hf, rope = "attention/", "self_attn.", R if c.rope_interleave else 0
    if Q is None:
        yield _linear(hf + "q_proj.weight", at + "w_q_DHX", (H, X), D, rope=rope)
    else:
        yield _linear(hf + "q_a_proj.weight", at + "w_q_a_DQ", Q, D)
        yield _vector(hf + "q_a_layernorm.weight", Q, at + "q_a_norm/scale")
        yield _linear(hf + "q_b_proj.weight", at + "w_q_b_QHX", (H, X), Q, rope=rope)
    yield _linear(hf + "kv_a_proj_with_mqa.weight", at + "w_kv_a_DX", C + R, D, rope=rope)
    yield _vector(hf + "kv_a_layernorm.weight", C, at + "kv_a_norm/scale")
    yield _linear(hf + "kv_b_proj.weight", at + "w_kv_b_CHX", (H, N + U), C)
    yield Source(hf + "o_proj.weight", (D, H * U), at + "w_o_HUD", (D, H, U), (1, 2, 0))
    if c.attention_bias:
        if Q is not None:
            yield _vector(hf + "q_a_proj.bias", Q, at + "b_q_a_Q")
        yield _vector(hf + "kv_a_proj_with_mqa.bias", C + R, at + "b_kv_a_X", rope)
        yield _vector(hf + "o_proj.bias", D, at + "b_o_D")


def _swiglu(c: ModelConfig, at: str, hf: str, ffn: int) -> Iterator[Source]:
    for i, kind in enumerate(("gate", "up")):
        yield _linear(f"{hf}{kind}_proj.weight", at + "w_gate_up_D2F", ffn, c.hidden_size, (_ALL, i))
    yield _linear(hf + "down_proj.weight", at + "w_down_FD", c.hidden_size, ffn)


def _moe(c: ModelConfig) -> Iterator[Source]:
    D, E, M = c.hidden_size, c.n_routed_experts, c.moe_intermediate_size
    yield _linear("mlp.gate.weight", "ffn/router/w_DE", E, D)
    yield _vector("mlp.gate.e_score_correction_bias", E, "ffn/router/bias_E")
    for e in range(E):
        hf = f"mlp.experts.{e}."
        for i, kind in enumerate(("gate", "up")):
            yield _linear(f"{hf}{kind}_proj.weight", "ffn/w_gate_up_ED2M", M, D, (e, _ALL, i))
        yield _linear(hf + "down_proj.weight", "ffn/w_down_EMD", D, M, (e,))
    yield from _swiglu(c, "ffn/shared/", "mlp.shared_experts.", c.n_shared_experts * M)


def _block(c: ModelConfig, moe: bool) -> Iterator[Source]:
    yield _vector("input_layernorm.weight", c.hidden_size, "attention_norm/scale")
    yield _vector("post_attention_layernorm.weight", c.hidden_size, "ffn_norm/scale")
    yield from _attention(c)
    yield from _moe(c) if moe else _swiglu(c, "ffn/", "mlp.", c.intermediate_size)


def _mtp(c: ModelConfig) -> Iterator[Source]:
    D = c.hidden_size
    yield _vector("enorm.weight", D, "embed_norm/scale")
    yield _vector("hnorm.weight", D, "hidden_norm/scale")
    yield _linear("eh_proj.weight", "w_XD", D, 2 * D)
    for s in _block(c, True):
        yield replace(s, array=f"block/{s.array}")
    yield _vector("shared_head.norm.weight", D, "norm/scale")


def _within(found: Iterator[Source], tensors: str, arrays: str, index: Index = ()) -> Iterator[Source]:
    for s in found:
        yield replace(s, tensor=tensors + s.tensor, array=f"{arrays}/{s.array}", index=(*index, *s.index))


def sources(c: ModelConfig) -> Iterator[Source]:
    """Every tensor of the model, in the order of its layers; together they fill every array."""
    V, D, L = c.vocab_size, c.hidden_size, c.num_hidden_layers
    yield Source("model.embed_tokens.weight", (V, D), "embed_VD", (V, D), (0, 1))
    for i in range(L):
        moe = i >= c.num_dense_layers
        stack, layer = ("moe_blocks", i - c.num_dense_layers) if moe else ("dense_blocks", i)
        yield from _within(_block(c, moe), f"model.layers.{i}.", stack, (layer,))
    for k in range(c.num_nextn_predict_layers):
        yield from _within(_mtp(c), f"model.layers.{L + k}.", f"mtp/{k}")
    yield _vector("model.norm.weight", D, "norm/scale")
    if not c.tie_word_embeddings:
        yield _linear("lm_head.weight", "head_DV", V, D)


def copies(c: ModelConfig) -> Iterator[Copy]:
    """Tensors that released checkpoints carry besides: the embedding and the head, which MTP modules share."""
    shape, embed = (c.vocab_size, c.hidden_size), "model.embed_tokens.weight"
    head = embed if c.tie_word_embeddings else "lm_head.weight"
    if c.tie_word_embeddings:
        yield Copy("lm_head.weight", embed, shape)
    for k in range(c.num_nextn_predict_layers):
        prefix = f"model.layers.{c.num_hidden_layers + k}."
        yield Copy(prefix + "embed_tokens.weight", embed, shape)
        yield Copy(prefix + "shared_head.head.weight", head, shape)


def examples(c: ModelConfig) -> dict[str, Source]:
    """A tensor of each array. The other 46,000 of a large model differ from these in their layer or expert alone."""
    return {s.array: s for s in sources(replace(c, num_hidden_layers=min(c.num_hidden_layers, c.num_dense_layers + 1)))}
