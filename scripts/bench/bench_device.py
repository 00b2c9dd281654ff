"""This package's kernels and a training step on the accelerator that is here, beside plain JAX; a table and JSON.

Every kernel first goes through its operation's suite of cases (`pallas_kernels.testing`). Then it answers the same question as
its definition in plain JAX at the released model's sizes, the largest difference is printed, and both are timed, interleaved;
the ratio is of the medians. `TFLOP/s` counts the products' work, `GB/s` what a kernel must read and write. 8-bit products stand
beside bfloat16's (`jnp.dot`) too.

`--model` times whole training steps of a model of 2.4 billion parameters (fits 80 GB) by recipe, checks that each learns one
batch by heart alike, and that nothing is compiled after the first step.

On a CPU both sides are plain JAX: good for trying the script. Examples:
  python scripts/bench/bench_device.py
  python scripts/bench/bench_device.py --only matmul --repeat 50
  python scripts/bench/bench_device.py --model --recipes bf16 deepseek
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_precision import batch_of

from dsv3_jax.config import load_config
from dsv3_jax.exchange.codec import Codec
from dsv3_jax.model.counts import training_flops_per_token
from dsv3_jax.precision.platforms import Platform, platform_of
from dsv3_jax.state.train_state import new_state
from dsv3_jax.training.step import make_train_step
from pallas_kernels import registry, testing
from pallas_kernels.causal_attention.api import causal_attention
from pallas_kernels.gradient_codes.api import mean_of_codes, pack_codes
from pallas_kernels.linear_cross_entropy.api import linear_cross_entropy
from pallas_kernels.quantize.api import quantize, quantize_transposed
from pallas_kernels.scaled import TILE, Scaled, dequantize
from pallas_kernels.scaled_matmul.api import grouped_scaled_matmul, grouped_scaled_wgrad, scaled_matmul
from pallas_kernels.swiglu_quantize.api import swiglu_backward, swiglu_quantize

ROOT = Path(__file__).resolve().parents[2]
MODEL = [
    "model.vocab_size=32768", "model.hidden_size=2048", "model.num_hidden_layers=10", "model.first_k_dense_replace=1",
    "model.intermediate_size=6144", "model.moe_intermediate_size=1024", "model.n_routed_experts=32",
    "model.num_experts_per_tok=4", "model.n_group=4", "model.topk_group=2", "model.num_attention_heads=16",
    "model.q_lora_rank=768", "model.kv_lora_rank=512", "model.qk_nope_head_dim=128", "model.qk_rope_head_dim=64",
    "model.v_head_dim=128", "model.num_nextn_predict_layers=1", "data.seq_len=4096", "data.batch_size=4", "optim.lr=3e-4",
]  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    tokens: int = 4096
    hidden: int = 7168
    ffn: int = 2048
    experts: int = 8
    heads: int = 16
    vocabulary: int = 16160  # an eighth of 129,280: a device's columns where the head is sharded


SMALL = Sizes(tokens=256, hidden=256, ffn=128, experts=2, heads=2, vocabulary=300)


@dataclass(frozen=True)
class Case:
    """`run(implementation, *arguments)`; `tolerance` is of the largest difference over the largest number."""

    run: Callable
    arguments: tuple
    tolerance: float
    flops: float = 0.0
    moved: float = 0.0  # bytes
    plain: str = "reference"  # the implementation beside it
    bf16: tuple = ()  # the same product in 16 bits: a function and its arguments
    compared: Callable = lambda results: results  # what of them must not differ


def normal(seed: int, *shape: int, dtype=jnp.bfloat16) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def nbytes(tree: Any) -> int:
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))


def quantising_cases(s: Sizes) -> dict[str, Case]:
    s = replace(s, tokens=8 * s.tokens)  # as many as take longer than starting a kernel
    x, gate_up = normal(0, s.tokens, s.hidden), normal(2, s.tokens, 2 * s.ffn)
    dh, weight = normal(3, s.tokens, s.ffn), jnp.ones(s.tokens)
    kept = quantize(gate_up, 1, implementation="reference")
    # a number may round to its neighbour in 8 bits, 1/16 of it, where a last bit of float32 differs
    neighbour = 0.07
    return {
        "quantize 1x128": Case(lambda i, x: quantize(x, 1, implementation=i), (x,), 0.0, moved=1.5 * nbytes(x)),
        "quantize 128x128": Case(lambda i, x: quantize(x, 128, implementation=i), (x,), 0.0, moved=1.5 * nbytes(x)),
        "quantize_transposed": Case(
            lambda i, x: quantize_transposed(x, implementation=i), (x,), 0.0, moved=1.5 * nbytes(x)
        ),
        "swiglu_quantize": Case(
            lambda i, x: swiglu_quantize(x, implementation=i), (gate_up,), neighbour, moved=1.75 * nbytes(gate_up)
        ),
        "swiglu_backward": Case(
            lambda i, kept, dh, w: swiglu_backward(kept, dh, w, i), (kept, dh, weight), 1e-2,
            moved=nbytes((kept, dh, gate_up, dh)),
        ),
    }  # fmt: skip


def code_cases(s: Sizes) -> dict[str, Case]:
    """A number midway between two levels may become either code: what is sent and the residual make up for each other, and
    the residual is as large. To float32's rounding of sums and roots."""
    shape = s.tokens * s.hidden // 256, 256
    x, error = normal(0, *shape, dtype=jnp.float32), normal(1, *shape, dtype=jnp.float32)
    unit = jnp.exp(normal(2, *shape, dtype=jnp.float32))

    def case(codec: Codec) -> Case:
        def compared(results):
            codes, scales, residual = results
            sent = mean_of_codes(codes[None], scales[None], codec.table, "reference")
            return scales, sent * unit + residual, jnp.sqrt(jnp.square(residual / unit).mean(1))

        moved = 4 * nbytes(x) + x.size // codec.block * codec.block_bytes
        return Case(
            lambda i, x, error, unit: pack_codes(x, error, unit, codec.table, i), (x, error, unit), 1e-5, moved=moved,
            compared=compared,
        )  # fmt: skip

    return {f"pack_codes {bits} bits": case(Codec(bits)) for bits in (1, 2, 4, 8)}


def product_cases(s: Sizes) -> dict[str, Case]:
    """Sums in another order, and of tensor cores that keep about 14 bits of a tile's: a result in bfloat16 may become its
    neighbour, 1/128 away."""
    T, D, X, E, bf16 = s.tokens, s.hidden, 2 * s.ffn, s.experts, jnp.dtype("bfloat16")
    x, w, dy = normal(0, T, D), normal(1, X, D), normal(2, T, X)
    many, stacked = normal(3, E, X, D), jnp.repeat(jnp.arange(E, dtype=jnp.int32), T // TILE // E)
    a, b = quantize(x, 1, implementation="reference"), quantize(w, 128, implementation="reference")
    blocks = jax.vmap(lambda w: quantize(w, 128, implementation="reference"))(many)
    all_blocks = Scaled(blocks.values.reshape(E * X, D), jnp.moveaxis(blocks.scales, 0, 1).reshape(D // TILE, -1))
    a_t, b_t = (quantize_transposed(m, implementation="reference") for m in (x, dy))
    flops, in_groups = 2 * T * D * X, x.reshape(E, T // E, D)
    return {
        "scaled_matmul forward": Case(
            lambda i, a, b: scaled_matmul(a, b, bf16, i), (a, b), 8e-3, flops, bf16=(lambda x, w: jnp.dot(x, w.T), x, w)
        ),
        "scaled_matmul wgrad": Case(
            lambda i, a, b: scaled_matmul(a, b, implementation=i), (b_t, a_t), 1e-3, flops,
            bf16=(lambda dy, x: jnp.dot(dy.T, x, preferred_element_type=jnp.float32), dy, x),
        ),
        "grouped_scaled_matmul": Case(
            lambda i, a, b, g: grouped_scaled_matmul(a, b, g, X, bf16, i), (a, all_blocks, stacked), 8e-3, flops,
            bf16=(lambda x, w: jnp.einsum("etd,exd->etx", x, w), in_groups, many),
        ),
        "grouped_scaled_wgrad": Case(
            lambda i, a, b, g: grouped_scaled_wgrad(a, b, g, E, implementation=i), (b_t, a_t, stacked), 1e-3, flops,
            bf16=(
                lambda dy, x: jnp.einsum("etx,etd->exd", dy, x, preferred_element_type=jnp.float32),
                dy.reshape(E, T // E, X), in_groups,
            ),
        ),
    }  # fmt: skip


def core_cases(s: Sizes) -> dict[str, Case]:
    """In 16 bits; forward and gradients."""
    q, k = (normal(i, 1, s.tokens, s.heads, 192) for i in range(2))
    v, segment = normal(2, 1, s.tokens, s.heads, 128), jnp.zeros((1, s.tokens), jnp.int32)
    half, D, V = s.tokens**2 / 2 * s.heads, s.hidden, s.vocabulary
    x, w = normal(3, s.tokens, D), normal(4, D, V) / D**0.5
    target, weight = jax.random.randint(jax.random.key(5), (s.tokens,), 0, V), jnp.ones(s.tokens) / s.tokens

    def attention(implementation, *qkv):
        def total(q, k, v):
            out = causal_attention(q, k, v, segment, 192**-0.5, implementation)
            return (out.astype(jnp.float32) ** 2).sum(), out

        return jax.value_and_grad(total, (0, 1, 2), has_aux=True)(*qkv)

    def cross_entropy(implementation, x, w):
        return jax.value_and_grad(lambda x, w: linear_cross_entropy(x, w, target, weight, implementation)[0], (0, 1))(x, w)

    return {
        # forward 2 products, backward 5
        "causal_attention, gradients": Case(attention, (q, k, v), 2e-2, half * 2 * (192 * 4 + 128 * 3), plain="xla"),
        "linear_cross_entropy, gradients": Case(cross_entropy, (x, w), 1e-2, 3 * 2 * s.tokens * D * V, plain="xla"),
    }


def difference(ours: Any, theirs: Any) -> float:
    """The largest, over the largest number, over all results. Infinite if one is not finite."""

    def numbers(tree):
        flat = jax.tree.leaves(tree, is_leaf=lambda a: isinstance(a, Scaled))
        return [np.asarray(dequantize(a) if isinstance(a, Scaled) else a, np.float32) for a in flat]

    worst = 0.0
    for a, b in zip(numbers(ours), numbers(theirs), strict=True):
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            return float("inf")
        worst = max(worst, float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)))
    return worst


def seconds(f: Callable, *arguments) -> float:
    """Seconds of one call, averaged over as many as fill a hundredth of a second, so that starting them is hidden."""
    start = time.perf_counter()
    jax.block_until_ready(f(*arguments))
    calls = max(1, int(0.01 / (time.perf_counter() - start)))
    start = time.perf_counter()
    for _ in range(calls):
        result = f(*arguments)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls


def measure(case: Case, kernels: str, repeat: int) -> dict[str, Any]:
    sides: dict[str, Callable] = {
        side: jax.jit(functools.partial(case.run, i)) for side, i in (("kernel", kernels), ("plain", case.plain))
    }
    results = {side: jax.block_until_ready(f(*case.arguments)) for side, f in sides.items()}
    found: dict[str, Any] = {"difference": difference(*(case.compared(results[side]) for side in sides))}
    found["ok"] = found["difference"] <= case.tolerance
    calls = {side: functools.partial(f, *case.arguments) for side, f in sides.items()}
    if case.bf16:
        f, *arguments = case.bf16
        calls["bf16"] = functools.partial(jax.jit(f), *arguments)
        jax.block_until_ready(calls["bf16"]())
    times: dict[str, list[float]] = {side: [] for side in calls}
    for _ in range(repeat):
        for side, call in calls.items():
            times[side].append(seconds(call))
    ms = {side: statistics.median(t) * 1e3 for side, t in times.items()}
    found["ms"] = ms
    found["rate"] = (
        f"{case.flops / ms['kernel'] / 1e9:.0f} TFLOP/s" if case.flops else f"{case.moved / ms['kernel'] / 1e6:.0f} GB/s"
    )
    return found


def check_kernels(kernels: str, only: str) -> dict[str, Any]:
    """Every operation's suite (`pallas_kernels.testing`), by this platform's kernel where there is one."""
    results: dict[str, Any] = {}
    for operation in testing.SUITES:
        if only not in operation:
            continue
        name = kernels if kernels in registry.implementations(operation) else "xla"
        try:
            refused = testing.check(operation, name)
        except Exception as error:  # a kernel that fails is this benchmark's result, and the others still count
            results[f"check {operation}"] = {"ok": False, "error": f"{type(error).__name__}: {error}"[:300]}
            print(f"{operation:34s} FAILED {results[f'check {operation}']['error']}", flush=True)
            continue
        results[f"check {operation}"] = {"ok": True, "implementation": name, "refused": refused}
        cases = len(testing.SUITES[operation].cases) - len(refused)
        print(
            f"{operation:34s} {name}: {cases} cases equal the definition"
            + (f"; refuses {', '.join(refused)}" if refused else "")
        )
    return results


def bench_kernels(platform: Platform, only: str, repeat: int) -> dict[str, Any]:
    small = platform.core == "xla"
    kernels, sizes = platform.core, SMALL if small else Sizes()
    results = check_kernels(kernels, only)
    print(
        f"{'':34s} {'kernel':>9s} {'plain JAX':>10s} {'ratio':>6s} {'bf16':>9s} {'ratio':>6s}  {'rate':12s} difference",
        flush=True,
    )
    for make in (quantising_cases, code_cases, product_cases, core_cases):
        for name, case in make(sizes).items():
            if only not in name:
                continue
            try:
                found = measure(case, kernels, repeat)
            except Exception as error:  # a kernel that fails is this benchmark's result, and the others still count
                results[name] = {"ok": False, "error": f"{type(error).__name__}: {error}"[:300]}
                print(f"{name:34s} FAILED {results[name]['error']}", flush=True)
                continue
            results[name], ms = found, found["ms"]
            beside = f"{ms['bf16']:6.3f} ms {ms['bf16'] / ms['kernel']:5.2f}x" if "bf16" in ms else " " * 16
            print(
                f"{name:34s} {ms['kernel']:6.3f} ms {ms['plain']:7.3f} ms {ms['plain'] / ms['kernel']:5.2f}x {beside}  "
                f"{found['rate']:12s} {found['difference']:.1e}{'' if found['ok'] else ' WRONG'}",
                flush=True,
            )
    return results


def bench_model(platform: Platform, recipes: list[str], steps: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for recipe in recipes:
        config = load_config(
            ROOT / "configs" / "tiny.yaml",
            [*([] if platform.core == "xla" else MODEL), f"precision.recipe={recipe}", "optim.warmup_steps=2"],
        )
        batch: Any = batch_of(config)
        state, step = jax.block_until_ready(new_state(config)), make_train_step(config)
        times, losses = [], []
        for _ in range(steps):
            start = time.perf_counter()
            state, metrics = jax.block_until_ready(step(state, batch))
            times.append(time.perf_counter() - start)
            losses.append(float(metrics.objective.loss))
        assert step._cache_size() == 1, "compiled more than once"
        del state
        rate = config.data.batch_size * config.data.seq_len / statistics.median(times[2:])
        flops = rate * training_flops_per_token(config.model, config.data.seq_len) / 1e12
        peak = platform.tera_ops.get("bf16", 0)
        memory = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30
        results[recipe] = {
            "tokens_per_s": rate, "tflops": flops, "first_step_s": times[0], "losses": losses, "peak_gib": memory,
        }  # fmt: skip
        share = f", {flops / peak:.0%} of bf16's peak" if peak else ""
        print(
            f"{recipe:9s} {rate:8.0f} tokens/s, {flops:.0f} TFLOP/s{share}; first step {times[0]:.1f} s; at most {memory:.1f} "
            f"GiB; loss {losses[0]:.3f} -> {losses[-1]:.3f}",
            flush=True,
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--repeat", type=int, default=20, help="measurements of each side")
    parser.add_argument("--model", action="store_true", help="training steps instead of kernels")
    parser.add_argument("--recipes", nargs="+", default=["bf16", "deepseek"], help="of --model")
    parser.add_argument("--steps", type=int, default=20, help="of each recipe of --model")
    args = parser.parse_args()
    device = jax.devices()[0]
    platform = platform_of(device)
    print(f"{device.device_kind} ({platform.name}), jax {jax.__version__}", flush=True)
    bench = (bench_model, args.recipes, args.steps) if args.model else (bench_kernels, args.only, args.repeat)
    results = bench[0](platform, *bench[1:])
    print(json.dumps({"device": device.device_kind, "jax": jax.__version__, "results": results}))
    if not args.model and not all(found["ok"] for found in results.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
