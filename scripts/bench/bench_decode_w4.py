"""Decoding speed of weights in 4 bits beside float32 on this CPU; prints a table and one JSON line, with the processor's name.

A random model of the released one's proportions, 1.9 GB in float32, batch 1, in one process: float32, then every linear layer
in 4 bits with groups of 128, in turns. A rate is that of the tokens after the first ones, so that reading the prompt and
arranging weights, once for each call, do not count.
Example: python scripts/bench/bench_decode_w4.py --rounds 5
"""

import argparse
import json
import os
import platform
import re
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import dsv3_jax as dsv3
from dsv3_jax.checkpoint.integers import IntegerArray
from dsv3_jax.cluster.huge_pages import use_huge_pages
from dsv3_jax.compression.container import integer_arrays_of
from dsv3_jax.compression.profile import Profile
from dsv3_jax.config import ModelConfig
from dsv3_jax.model.names import variables_by_name
from dsv3_jax.model.transformer import Transformer
from pallas_kernels.integer_weight import IntegerFormat, IntegerWeight

MODEL = ModelConfig(
    vocab_size=4096, hidden_size=2048, num_hidden_layers=4, first_k_dense_replace=1, intermediate_size=5376,
    moe_intermediate_size=640, n_routed_experts=32, n_shared_experts=1, num_experts_per_tok=8, n_group=4, topk_group=2,
    num_attention_heads=32, q_lora_rank=512, kv_lora_rank=128, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    num_nextn_predict_layers=0,
)  # fmt: skip
W4 = Profile("w4", linears=IntegerFormat(4, 128), experts=IntegerFormat(4, 128))
_FEW, _MANY = 16, 80  # new tokens of the two calls whose difference is timed


def integer_model(integers: dict[str, IntegerArray]) -> Transformer:
    """The model with random codes and scales in place of its linear layers; which they are does not matter to speed."""
    random = np.random.default_rng(0)
    graph, state = nnx.split(nnx.eval_shape(lambda: Transformer(MODEL, rngs=nnx.Rngs(0))))
    for name, variable in variables_by_name(state).items():
        shape = variable.get_value().shape
        if name in integers:
            weight = integers[name].weight(shape)
            codes = jnp.asarray(random.integers(0, 256, weight.codes.shape, np.uint8))
            scale = jnp.full(weight.scale.shape, 2.0**-9, jnp.float16)
            value = IntegerWeight(codes, scale, None, weight.format, weight.inputs, weight.outputs)
        else:
            value = jnp.asarray(random.standard_normal(shape, np.float32) / 50 + name.endswith("scale"))
        variable.set_value(value)
    return nnx.merge(graph, state)


def dense_model(model: Transformer) -> Transformer:
    """The same numbers in float32."""

    def dense(leaf):
        return leaf.astype(jnp.float32) if isinstance(leaf, IntegerWeight) else leaf

    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(dense, state, is_leaf=lambda leaf: isinstance(leaf, IntegerWeight)))


def seconds_per_token(model: Transformer) -> float:
    """Seconds a token of greedy decoding at batch 1, after the programs were compiled."""

    def seconds(tokens: int) -> float:
        begin = time.perf_counter()
        dsv3.generate(model, [[1, 2, 3, 4, 5, 6, 7, 8]], tokens).block_until_ready()
        return time.perf_counter() - begin

    seconds(1)
    few, many = seconds(_FEW), seconds(_MANY)
    return (many - few) / (_MANY - _FEW)


def bytes_a_token(model: Transformer) -> float:
    """Weights that a token reads: a quarter of the experts, keys' and values' up-projection and the head in float32."""
    total = 0.0
    for name, variable in variables_by_name(nnx.state(model)).items():
        value = variable.get_value()
        share = (
            MODEL.num_experts_per_tok / MODEL.n_routed_experts if name.endswith(("ffn/w_gate_up_ED2M", "ffn/w_down_EMD")) else 1
        )
        if name.endswith("embed_VD"):
            continue
        total += 4 * value.size if name.endswith("w_kv_b_CHX") else share * value.nbytes
    return total


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="how often each measurement is repeated")
    args = parser.parse_args()
    w4 = integer_model(integer_arrays_of(MODEL, W4))
    models = {"float32": dense_model(w4), "w4": w4}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(args.rounds):
        for name, model in models.items():
            seconds[name].append(seconds_per_token(model))
    ratios = [dense / integer for dense, integer in zip(seconds["float32"], seconds["w4"], strict=True)]
    found: dict[str, Any] = {"processor": processor(), "threads": os.cpu_count()}
    print(f"{found['processor']}, {found['threads']} cores")
    for name, model in models.items():
        rate, moved = 1 / statistics.median(seconds[name]), bytes_a_token(model)
        found[name] = {"tokens_per_s": rate, "bytes_a_token": moved}
        print(f"{name:8s} {rate:7.1f} tokens/s  {moved / 1e6:6.0f} MB of weights a token  {rate * moved / 1e9:5.1f} GB/s")
    found |= {"ratio": statistics.median(ratios), "ratios": ratios}
    print(f"w4 is {found['ratio']:.2f}x float32 (rounds: {', '.join(f'{ratio:.2f}' for ratio in ratios)})")
    print(json.dumps(found))


if __name__ == "__main__":
    use_huge_pages()
    main()
