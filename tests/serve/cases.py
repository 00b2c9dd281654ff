"""A model of 60 thousand parameters with an MTP module, and requests of all kinds."""

import dataclasses
import functools

import numpy as np
from flax import nnx

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.serve.request import SamplingParams

CONFIG = ModelConfig(
    vocab_size=96, hidden_size=32, num_hidden_layers=2, first_k_dense_replace=1, intermediate_size=48,
    moe_intermediate_size=16, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, n_group=2, topk_group=1,
    num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    num_nextn_predict_layers=1, max_position_embeddings=512, initializer_range=0.2,
)  # fmt: skip


@functools.cache
def model(**fields) -> Transformer:
    return Transformer(dataclasses.replace(CONFIG, **fields), rngs=nnx.Rngs(0))


def prompts(count: int, longest: int = 60, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, CONFIG.vocab_size, length).tolist() for length in random.integers(1, longest, count)]


def params(count: int, most: int = 24) -> list[SamplingParams]:
    """Greedy, sampled, limited and penalised requests of different lengths, all with log-probabilities."""
    kinds = [
        {}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9}, {"temperature": 1.0, "top_k": 9},
        {"temperature": 2.0, "min_p": 0.05}, {"frequency_penalty": 1.5, "presence_penalty": 0.5},
        {"temperature": 1.0, "repetition_penalty": 1.3}, {"logit_bias": {5: 2.0, 6: -100.0}}, {"prompt_logprobs": 3},
    ]  # fmt: skip
    return [SamplingParams(max_tokens=1 + (7 * i) % most, seed=i, logprobs=20, **kinds[i % len(kinds)]) for i in range(count)]
