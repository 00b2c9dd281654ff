"""Hugging Face tensor names and layouts to ours, and the reader of safetensors checkpoints.

A checkpoint is described once, as a list of `Source`s: which of our arrays, which layer of it, from which tensors, by which
conversion. Reading, checking for missing and unexpected tensors, and testing gradients all follow that list.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import UserError
from dsv3_jax.interop.hf_config import read_hf_config
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.precision.recipes import Recipe

Path_ = tuple[str | int, ...]


@dataclass(frozen=True)
class Source:
    """Where one array, or one layer of a stacked array, comes from."""

    path: Path_  # place in the model's state
    names: tuple[str, ...]  # tensors, in the order `convert` takes them
    convert: Callable[..., np.ndarray]
    layer: int | None = None  # index on the leading axis of a stack


def _halves(config: ModelConfig, x: np.ndarray) -> np.ndarray:
    """Permute the last R entries from interleaved pairs (2i, 2i+1) to halves (i, i+R/2), which `model/rope.py` rotates."""
    R = config.qk_rope_head_dim
    if not config.rope_interleave:
        return x
    rope = x[..., -R:]
    return np.concatenate([x[..., :-R], rope[..., 0::2], rope[..., 1::2]], axis=-1)


def _same(x: np.ndarray) -> np.ndarray:
    return x


def _transpose(x: np.ndarray) -> np.ndarray:
    return x.T


def _gate_up(gate_FD: np.ndarray, up_FD: np.ndarray) -> np.ndarray:
    return np.stack([gate_FD.T, up_FD.T], axis=1)


def _attention_sources(c: ModelConfig) -> Iterator[Source]:
    H, C, X = c.num_attention_heads, c.kv_lora_rank, c.qk_head_dim

    def queries(w_XA: np.ndarray) -> np.ndarray:
        return _halves(c, w_XA.T.reshape(-1, H, X))

    at, hf = ("attention",), "self_attn."
    if c.q_lora_rank is None:
        yield Source((*at, "w_q_DHX"), (hf + "q_proj.weight",), queries)
    else:
        yield Source((*at, "w_q_a_DQ"), (hf + "q_a_proj.weight",), _transpose)
        yield Source((*at, "q_a_norm", "scale"), (hf + "q_a_layernorm.weight",), _same)
        yield Source((*at, "w_q_b_QHX"), (hf + "q_b_proj.weight",), queries)
    yield Source((*at, "w_kv_a_DX"), (hf + "kv_a_proj_with_mqa.weight",), lambda w: _halves(c, w.T))
    yield Source((*at, "kv_a_norm", "scale"), (hf + "kv_a_layernorm.weight",), _same)
    yield Source((*at, "w_kv_b_CHX"), (hf + "kv_b_proj.weight",), lambda w: w.T.reshape(C, H, -1))
    yield Source((*at, "w_o_HUD"), (hf + "o_proj.weight",), lambda w: w.T.reshape(H, c.v_head_dim, -1))
    if c.attention_bias:
        if c.q_lora_rank is not None:
            yield Source((*at, "b_q_a_Q"), (hf + "q_a_proj.bias",), _same)
        yield Source((*at, "b_kv_a_X"), (hf + "kv_a_proj_with_mqa.bias",), partial(_halves, c))
        yield Source((*at, "b_o_D"), (hf + "o_proj.bias",), _same)


def _swiglu_sources(at: Path_, hf: str) -> Iterator[Source]:
    yield Source((*at, "w_gate_up_D2F"), (hf + "gate_proj.weight", hf + "up_proj.weight"), _gate_up)
    yield Source((*at, "w_down_FD"), (hf + "down_proj.weight",), _transpose)


def _experts(kinds: int, *weights: np.ndarray) -> np.ndarray:
    """Stack the experts' tensors, `kinds` (gate and up, or down) to an expert."""
    each = [weights[i : i + kinds] for i in range(0, len(weights), kinds)]
    return np.stack([_gate_up(*w) if kinds == 2 else w[0].T for w in each])


def _moe_sources(c: ModelConfig) -> Iterator[Source]:
    yield Source(("ffn", "router", "w_DE"), ("mlp.gate.weight",), _transpose)
    yield Source(("ffn", "router", "bias_E"), ("mlp.gate.e_score_correction_bias",), _same)
    names = [f"mlp.experts.{e}.{kind}_proj.weight" for e in range(c.n_routed_experts) for kind in ("gate", "up")]
    yield Source(("ffn", "w_gate_up_ED2M"), tuple(names), partial(_experts, 2))
    names = [f"mlp.experts.{e}.down_proj.weight" for e in range(c.n_routed_experts)]
    yield Source(("ffn", "w_down_EMD"), tuple(names), partial(_experts, 1))
    yield from _swiglu_sources(("ffn", "shared"), "mlp.shared_experts.")


def _block_sources(c: ModelConfig, moe: bool) -> Iterator[Source]:
    yield Source(("attention_norm", "scale"), ("input_layernorm.weight",), _same)
    yield Source(("ffn_norm", "scale"), ("post_attention_layernorm.weight",), _same)
    yield from _attention_sources(c)
    yield from _moe_sources(c) if moe else _swiglu_sources(("ffn",), "mlp.")


def _at(sources: Iterator[Source], path: Path_, prefix: str, layer: int | None = None) -> Iterator[Source]:
    for s in sources:
        yield replace(s, path=(*path, *s.path), names=tuple(prefix + n for n in s.names), layer=layer)


def sources(c: ModelConfig) -> list[Source]:
    """Every array of the model, with the tensors it comes from."""
    found = [
        Source(("embed_VD",), ("model.embed_tokens.weight",), _same),
        Source(("norm", "scale"), ("model.norm.weight",), _same),
    ]
    if not c.tie_word_embeddings:
        found.append(Source(("head_DV",), ("lm_head.weight",), _transpose))
    for i in range(c.num_hidden_layers):
        moe = i >= c.num_dense_layers
        stack, layer = ("moe_blocks", i - c.num_dense_layers) if moe else ("dense_blocks", i)
        found += _at(_block_sources(c, moe), (stack,), f"model.layers.{i}.", layer)
    for k in range(c.num_nextn_predict_layers):
        prefix = f"model.layers.{c.num_hidden_layers + k}."
        module = [
            Source(("embed_norm", "scale"), ("enorm.weight",), _same),
            Source(("hidden_norm", "scale"), ("hnorm.weight",), _same),
            Source(("w_XD",), ("eh_proj.weight",), _transpose),
            Source(("norm", "scale"), ("shared_head.norm.weight",), _same),
        ]
        found += _at(iter(module), ("mtp", k), prefix)
        found += _at(_block_sources(c, True), ("mtp", k, "block"), prefix)
    return found


def _optional_names(c: ModelConfig) -> set[str]:
    """Copies of the embedding and the head that checkpoints may carry."""
    names = {"lm_head.weight"} if c.tie_word_embeddings else set()
    for k in range(c.num_nextn_predict_layers):
        prefix = f"model.layers.{c.num_hidden_layers + k}."
        names |= {prefix + "embed_tokens.weight", prefix + "shared_head.head.weight"}
    return names


class TensorFiles:
    """Tensors of a checkpoint directory by name: one safetensors file, or several with an index."""

    def __init__(self, directory: Path):
        index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
        if index.exists():
            try:
                files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"cannot read {index}: {error!r}") from None
            if any(Path(f).name != f for f in files):
                raise UserError(f"{index}: shard names must be plain file names")
        elif single.exists():
            files = [single.name]
        else:
            raise UserError(f"{directory} has neither {single.name} nor {index.name}")
        self._file_of: dict[str, Any] = {}
        for name in files:
            try:
                # "flax" rather than "numpy": numpy alone has no bfloat16
                handle = safe_open(directory / name, framework="flax")
                self._file_of |= dict.fromkeys(handle.keys(), handle)
            except (OSError, SafetensorError) as error:
                raise UserError(f"cannot read {directory / name}: {error}") from None

    @property
    def names(self) -> set[str]:
        return set(self._file_of)

    def read(self, name: str) -> np.ndarray:
        return np.asarray(self._file_of[name].get_tensor(name))


def _check_names(c: ModelConfig, present: set[str], directory: Path) -> None:
    expected = {name for s in sources(c) for name in s.names}
    missing = sorted(expected - present)
    unexpected = sorted(present - expected - _optional_names(c))
    if missing:
        raise UserError(f"{directory}: tensor {missing[0]} is missing ({len(missing)} in all)")
    if unexpected:
        raise UserError(f"{directory}: tensor {unexpected[0]} is unexpected ({len(unexpected)} in all)")


def to_state(c: ModelConfig, shapes: Any, read: Callable[[str], np.ndarray]) -> dict:
    """A nested dict of float32 arrays shaped as `shapes` (the model's abstract state as a pure dict), read by name."""
    state = jax.tree.map(lambda s: np.empty(s.shape, np.float32), shapes)
    for s in sources(c):
        parent = state
        for key in s.path[:-1]:
            parent = parent[key]
        target = parent[s.path[-1]] if s.layer is None else parent[s.path[-1]][s.layer]
        try:
            value = s.convert(*(read(name).astype(np.float32) for name in s.names))
        except (ValueError, TypeError) as error:  # tensors whose shapes do not even fit each other
            raise UserError(f"tensor {s.names[0]} does not have the shape that config.json implies: {error}") from None
        if value.shape != target.shape:
            raise UserError(
                f"tensor {s.names[0]} has a wrong shape: config.json implies {target.shape} in this project's layout, "
                f"found {value.shape}"
            )
        target[...] = value
    return state


def load_hf(directory: str | Path, dtype: Any = jnp.float32) -> Transformer:
    """Load a float32 or bfloat16 checkpoint in Hugging Face's DeepSeek-V3 layout; `dtype` is that of the computation.

    A checkpoint without the tensors of its MTP modules (transformers drops them) loads as a model without them. Raises
    `UserError` naming a config field that is unknown or unsupported, or a tensor that is missing, unexpected or misshapen.
    """
    directory = Path(directory)
    config = read_hf_config(directory)
    files = TensorFiles(directory)
    if not any(name.startswith(f"model.layers.{config.num_hidden_layers}.") for name in files.names):
        config = replace(config, num_nextn_predict_layers=0)
    _check_names(config, files.names, directory)
    model = nnx.eval_shape(lambda: Transformer(config, recipe=Recipe(jnp.dtype(dtype).name), rngs=nnx.Rngs(0)))
    graph, shapes = nnx.split(model)
    state = to_state(config, nnx.to_pure_dict(shapes), files.read)
    nnx.replace_by_pure_dict(shapes, jax.tree.map(jnp.asarray, state))
    return nnx.merge(graph, shapes)
