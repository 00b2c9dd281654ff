"""Sizes and costs of a model, counted from its declared arrays: parameters, bytes, cache, FLOPs. Allocates nothing."""

import math
from dataclasses import dataclass

from flax import nnx

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.names import variables_by_name
from dsv3_jax.model.parameters import kind_of
from dsv3_jax.model.transformer import Transformer

COMPONENTS = ("embedding", "head", "attention", "dense ffn", "routed experts", "shared experts", "router", "norms")


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters. `mtp` is all MTP modules without the embedding and head they share with the main model."""

    main: dict[str, int]  # by component
    mtp: int
    activated: int  # main model: parameters multiplied with a token; the embedding is a lookup and not among them
    mtp_activated: int  # MTP modules, without the shared head

    @property
    def total(self) -> int:
        """Parameters of the main model, as published figures have it."""
        return sum(self.main.values())


def _used(config: ModelConfig, component: str, size: int) -> int:
    """Parameters of `size` that one token is multiplied with."""
    if component == "embedding":
        return size if config.tie_word_embeddings else 0  # a tied embedding is the head too
    if component == "routed experts":
        return size // config.n_routed_experts * config.num_experts_per_tok
    return size


def count_parameters(config: ModelConfig) -> Counts:
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    main: dict[str, int] = dict.fromkeys(COMPONENTS, 0)
    mtp = activated = mtp_activated = 0
    for name, variable in variables_by_name(nnx.state(model)).items():
        component, size = kind_of(variable).component, math.prod(variable.get_value().shape)
        used = _used(config, component, size)
        if name.startswith("mtp/"):
            mtp, mtp_activated = mtp + size, mtp_activated + used
        else:
            main[component] += size
            activated += used
    return Counts(main, mtp, activated, mtp_activated)


def cache_numbers_per_token(config: ModelConfig) -> int:
    """Numbers that MLA caches for a token over all layers of the main model."""
    return config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim)


def training_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Forward and backward, without recomputation: 6 for every multiplied parameter, MTP modules and their use of the
    head included, and 6 * H * (qk_head_dim + v_head_dim) for every key a query sees, which is (seq_len + 1) / 2 on average.
    """
    counts = count_parameters(config)
    depth = config.num_nextn_predict_layers
    head = config.hidden_size * config.vocab_size
    multiplied = counts.activated + counts.mtp_activated + depth * head
    layers = config.num_hidden_layers + depth
    keys = (seq_len + 1) / 2
    attention = layers * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim) * keys
    return 6.0 * (multiplied + attention)
