"""Our side of bench_train.py, bench_decode.py and bench_serve.py, in a process of its own so that peak memory is its own."""

import json
import resource
import statistics
import sys
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from dsv3_jax.checkpoint.load import load
from dsv3_jax.config import Config, load_config
from dsv3_jax.data.batch import Batch
from dsv3_jax.precision.recipes import RECIPES
from dsv3_jax.serve.engine import Engine
from dsv3_jax.serve.generate import generate
from dsv3_jax.serve.request import SamplingParams
from dsv3_jax.state.train_state import make_model, new_state
from dsv3_jax.training.step import make_train_step

ROOT = Path(__file__).resolve().parents[2]


def train(config: Config, request: dict) -> dict:
    state = jax.block_until_ready(new_state(config))
    step = make_train_step(config)
    shape = (config.data.batch_size, config.data.seq_len + 1 + config.model.num_nextn_predict_layers)
    random = np.random.default_rng(0)
    times = []
    for _ in range(request["steps"] + 2):
        batch = Batch(random.integers(0, config.model.vocab_size, shape, np.int32), np.zeros(shape, np.int32))
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(step(state, batch))
        times.append(time.perf_counter() - start)
    assert step._cache_size() == 1
    return {"first_step_s": times[0], "step_s": statistics.median(times[2:]), "loss": float(metrics.objective.loss)}


def decode(config: Config, request: dict) -> dict:
    model = nnx.jit(lambda: make_model(config, RECIPES["float32"], nnx.Rngs(0)))()
    result = {}
    for batch in request["batch_sizes"]:
        prompt = np.random.default_rng(0).integers(2, config.model.vocab_size, (batch, request["prompt_len"]))
        times = []
        for _ in range(request["repeats"] + 1):
            start = time.perf_counter()
            jax.block_until_ready(generate(model, prompt, request["new_tokens"]))
            times.append(time.perf_counter() - start)
        result[str(batch)] = statistics.median(times[1:])
    return {"seconds": result}


def serve(request: dict) -> dict:
    """Greedy texts of all requests, ([ids], number of tokens) each, by the engine."""
    requests = json.loads(Path(request["requests"]).read_text())
    prompts, params = [ids for ids, _ in requests], [SamplingParams(max_tokens=n) for _, n in requests]
    context = max(len(ids) + n for ids, n in requests)
    with Engine(load(request["model"]), slots=request["batch"], context=context) as engine:
        engine.complete([ids[::-1] for ids in prompts[:8]], params[:8])  # no prompt that counts is in the cache
        start = time.perf_counter()
        found = engine.complete(prompts, params)
        return {"seconds": time.perf_counter() - start, "texts": [completion.tokens for completion in found]}


def matmul(config: Config, request: dict) -> dict:
    """GFLOP/s of plain float32 products of the model's shapes: the rate that a step made of them alone would reach."""
    tokens, m = config.data.batch_size * config.data.seq_len, config.model
    share = tokens * m.num_experts_per_tok // m.n_routed_experts
    shapes = [
        (tokens, m.hidden_size, m.vocab_size),
        (tokens, m.hidden_size, 2 * m.intermediate_size),
        (tokens, m.hidden_size, 2 * m.moe_intermediate_size),
        (tokens, m.q_lora_rank or m.hidden_size, m.num_attention_heads * m.qk_head_dim),
        (share, m.hidden_size, 2 * m.moe_intermediate_size),
        (share, m.moe_intermediate_size, m.hidden_size),
    ]
    product = jax.jit(lambda a, b: a @ b)
    rates = []
    for rows, inner, columns in shapes:
        a, b = (jax.random.normal(jax.random.key(0), s) for s in ((rows, inner), (inner, columns)))
        times = []
        for _ in range(12):
            start = time.perf_counter()
            jax.block_until_ready(product(a, b))
            times.append(time.perf_counter() - start)
        rates.append(2 * rows * inner * columns / statistics.median(times[2:]) / 1e9)
    return {"gflops": dict(zip([str(s) for s in shapes], rates, strict=True))}


def main() -> None:
    request = json.loads(sys.argv[1])
    if request["task"] == "serve":
        result = serve(request)
    else:
        config = load_config(ROOT / "configs" / request["preset"], request.get("overrides", []))
        result = {"train": train, "decode": decode, "matmul": matmul}[request["task"]](config, request)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps(result | {"peak_gb": peak, "jax": jax.__version__}))


if __name__ == "__main__":
    main()
