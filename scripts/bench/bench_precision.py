"""Step time of the precision recipes on this machine's CPU beside bf16, in one run; prints a table and one JSON line.

A CPU emulates 8 bits: this says what trying a recipe costs, and nothing about an accelerator. Steps of the recipes alternate,
because a shared machine drifts. Example: python scripts/bench/bench_precision.py configs/tiny.yaml --steps 10
"""

import argparse
import json
import statistics
import time
from typing import Any

import jax
import numpy as np

from dsv3_jax.config import Config, load_config
from dsv3_jax.data.batch import Batch
from dsv3_jax.state.train_state import new_state
from dsv3_jax.training.step import make_train_step

SIDES = {
    "bf16": ["precision.recipe=bf16"],
    "float32": ["precision.recipe=float32"],
    "deepseek": ["precision.recipe=deepseek"],
    "deepseek, controller": ["precision.recipe=deepseek", "precision.controller=true"],
    "int8": ["precision.recipe=int8"],
}


def batch_of(config: Config) -> Batch:
    shape = (config.data.batch_size, config.data.seq_len + 1 + config.model.num_nextn_predict_layers)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)
    return Batch(tokens, np.zeros(shape, np.int32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="configs/tiny.yaml")
    parser.add_argument("--steps", type=int, default=10, help="timed steps a recipe")
    args = parser.parse_args()
    steps, states, times = {}, {}, {name: [] for name in SIDES}
    for name, overrides in SIDES.items():
        config = load_config(args.config, overrides)
        steps[name], states[name] = make_train_step(config), new_state(config)
    batch: Any = batch_of(load_config(args.config))
    for _ in range(args.steps + 1):
        for name in SIDES:
            start = time.perf_counter()
            states[name], _ = jax.block_until_ready(steps[name](states[name], batch))
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(found[1:]) for name, found in times.items()}  # the first compiles
    for name, median in medians.items():
        print(f"{name:22s} {1e3 * median:6.0f} ms a step  {median / medians['bf16']:.2f}x bf16")
    print(json.dumps({"step_s": medians, "ratios": {name: m / medians["bf16"] for name, m in medians.items()}}))


if __name__ == "__main__":
    main()
