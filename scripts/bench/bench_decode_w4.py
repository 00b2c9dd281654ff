"""Decoding speed of weights in 4 bits beside float32 on this CPU; prints a table and one JSON line, with the processor's name.

A random model of the released one's proportions, 1.9 GB in float32, batch 1, in one process: float32, then every linear layer
in 4 bits with groups of 128, in turns. A rate is that of the tokens after the first ones, so that reading the prompt and
arranging weights, once for each call, do not count. With --peer llama.cpp beside it: our GGUF exports of the same numbers in
Q4_0, F16 and F32, in turns with ours, with as many threads; it is compiled for this machine on first use, which takes minutes.
Example: python scripts/bench/bench_decode_w4.py --rounds 5 --peer
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import dsv3_jax as dsv3
from dsv3_jax.bench.command import processor
from dsv3_jax.checkpoint.integers import IntegerArray
from dsv3_jax.cluster.huge_pages import use_huge_pages
from dsv3_jax.compression.container import integer_arrays_of
from dsv3_jax.compression.profile import Profile
from dsv3_jax.config import ModelConfig
from dsv3_jax.interop.gguf_file import TRUNK, write_gguf
from dsv3_jax.interop.hf_tensors import Source, sources
from dsv3_jax.interop.hf_text import TextFiles
from dsv3_jax.interop.quantized import Tensor, from_region
from dsv3_jax.model.names import variables_by_name
from dsv3_jax.model.transformer import Transformer
from pallas_kernels.integer_weight import IntegerFormat, IntegerWeight

sys.path.append(str(Path(__file__).parents[1]))
from tools._peer import ask, peer_python

MODEL = ModelConfig(
    vocab_size=4096, hidden_size=2048, num_hidden_layers=4, first_k_dense_replace=1, intermediate_size=5376,
    moe_intermediate_size=640, n_routed_experts=32, n_shared_experts=1, num_experts_per_tok=8, n_group=4, topk_group=2,
    num_attention_heads=32, q_lora_rank=512, kv_lora_rank=128, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    num_nextn_predict_layers=0,
)  # fmt: skip
W4 = Profile("w4", linears=IntegerFormat(4, 128), experts=IntegerFormat(4, 128))
_EXPERTS_READ = MODEL.num_experts_per_tok / MODEL.n_routed_experts
_PROMPT = [1, 2, 3, 4, 5, 6, 7, 8]
_FEW, _MANY = 16, 80  # new tokens of the two calls whose difference is timed
_FILES = {"llama.cpp Q4_0": "gguf", "llama.cpp F16": "gguf-f16", "llama.cpp F32": "gguf-f32"}


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
        dsv3.generate(model, [_PROMPT], tokens).block_until_ready()
        return time.perf_counter() - begin

    seconds(1)
    few, many = seconds(_FEW), seconds(_MANY)
    return (many - few) / (_MANY - _FEW)


def bytes_a_token(model: Transformer) -> float:
    """Weights that a token reads: a quarter of the experts, keys' and values' up-projection and the head in float32."""
    total = 0.0
    for name, variable in variables_by_name(nnx.state(model)).items():
        value = variable.get_value()
        share = _EXPERTS_READ if name.endswith(("ffn/w_gate_up_ED2M", "ffn/w_down_EMD")) else 1
        if name.endswith("embed_VD"):
            continue
        total += 4 * value.size if name.endswith("w_kv_b_CHX") else share * value.nbytes
    return total


def gguf_file(model: Transformer, format: str, scratch: Path) -> Path:
    """Our export of the model with integer weights."""
    arrays = {name: variable.get_value() for name, variable in variables_by_name(nnx.state(model)).items()}

    def read(s: Source) -> Tensor:
        w = arrays[s.array]
        if not isinstance(w, IntegerWeight):
            return s.to_tensor(np.asarray(w)[s.full_index])
        codes, scale = (np.asarray(x)[s.integer_index] for x in (w.codes, w.scale))
        return from_region(s, IntegerWeight(codes, scale, None, w.format, s.region[: s.inputs], len(s.region) - s.inputs))

    formats = {s.tensor: w.format for s in sources(MODEL) if isinstance(w := arrays[s.array], IntegerWeight)}
    written = write_gguf(
        scratch / format, MODEL, format, read, origin={}, text=TextFiles(), formats=formats, name="bench_decode_w4"
    )
    return written / TRUNK


def bytes_in_file(file: Path) -> float:
    """Bytes of a GGUF file's tensors that a token reads."""
    tensors = (t for t in gguf.GGUFReader(file).tensors if t.name != "token_embd.weight")
    return sum(float(t.n_bytes) * (_EXPERTS_READ if "_exps" in t.name else 1) for t in tensors)


def peers(file: Path) -> dict:
    """llama.cpp's seconds a token, at the places where ours are timed, and its greedy tokens."""
    request = {"path": str(file), "threads": os.cpu_count(), "prompt": _PROMPT, "skip": _FEW, "tokens": _MANY - _FEW}
    return ask(peer_python("llama"), "bench/_peer_llama.py", request, False)


def agreeing(some: list[int], others: list[int]) -> int:
    """How many tokens two texts have in common until they part."""
    return next((i for i, (a, b) in enumerate(zip(some, others, strict=True)) if a != b), len(some))


def print_ratios(found: dict[str, Any], seconds: Mapping[str, list[float]], name: str, others: list[str]) -> None:
    """How much faster one is than others, round by round."""
    for other in others:
        ratios = [its / ours for its, ours in zip(seconds[other], seconds[name], strict=True)]
        found[f"{name} over {other}"] = {"ratio": statistics.median(ratios), "ratios": ratios}
        rounds = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"{name} is {statistics.median(ratios):.2f}x {other} (rounds: {rounds})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="how often each measurement is repeated")
    parser.add_argument(
        "--peer", action="store_true", help="measure llama.cpp too; compiles it into .venv-llama if it is not there"
    )
    args = parser.parse_args()
    w4 = integer_model(integer_arrays_of(MODEL, W4))
    models = {"float32": dense_model(w4), "w4": w4}
    with tempfile.TemporaryDirectory() as scratch:
        files = {name: gguf_file(w4, format, Path(scratch)) for name, format in _FILES.items()} if args.peer else {}
        measure(models, files, args.rounds)


def measure(models: Mapping[str, Transformer], files: Mapping[str, Path], rounds: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in (*models, *files)}
    answers: dict[str, dict] = {}
    load = os.getloadavg()[0]
    for _ in range(rounds):
        for name, model in models.items():
            seconds[name].append(seconds_per_token(model))
        for name, file in files.items():
            answers[name] = peers(file)
            seconds[name].append(answers[name]["seconds"])
    found: dict[str, Any] = {"processor": processor(), "threads": os.cpu_count(), "load_before": load}
    print(f"{found['processor']}, {found['threads']} cores, load average before {load:.1f}")
    moved = {name: bytes_a_token(model) for name, model in models.items()} | {
        name: bytes_in_file(f) for name, f in files.items()
    }
    for name, its in moved.items():
        rate = 1 / statistics.median(seconds[name])
        found[name] = {"tokens_per_s": rate, "bytes_a_token": its}
        print(f"{name:14s} {rate:7.1f} tokens/s  {its / 1e6:6.0f} MB of weights a token  {rate * its / 1e9:5.1f} GB/s")
    print_ratios(found, seconds, "w4", ["float32", *files])
    if files:
        tokens = np.asarray(dsv3.generate(models["w4"], [_PROMPT], _MANY))[0, -_MANY:].tolist()
        same = {name: agreeing(tokens, answer["tokens"]) for name, answer in answers.items()}
        found["same_tokens"] = same
        print(f"greedy tokens as w4's, of {_MANY}: " + ", ".join(f"{name} {n}" for name, n in same.items()))
        print_ratios(found, seconds, "llama.cpp Q4_0", [name for name in files if name != "llama.cpp Q4_0"])
    print(json.dumps(found))


if __name__ == "__main__":
    use_huge_pages()
    main()
