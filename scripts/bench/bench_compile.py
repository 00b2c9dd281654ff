"""Compile time of the training step against depth: scanned layers make it independent of their number.

Compiles configs/small.yaml with 6 and 30 layers, alternating, without any cache; prints a table and one JSON line.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from dsv3_jax.config import load_config
from dsv3_jax.data.batch import Batch
from dsv3_jax.state.train_state import abstract_state
from dsv3_jax.training.step import make_train_step

_LAYERS = (6, 30)


def compile_seconds(layers: int) -> float:
    """Tracing, lowering and compiling the step with `layers` layers; nothing is allocated or run."""
    config = load_config(Path(__file__).parents[2] / "configs" / "small.yaml", [f"model.num_hidden_layers={layers}"])
    state = abstract_state(config)
    shape = jax.ShapeDtypeStruct((config.data.batch_size, config.data.seq_len + 1), jnp.int32)
    jax.clear_caches()
    start = time.perf_counter()
    make_train_step(config).lower(state, Batch(shape, shape)).compile()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    compile_seconds(_LAYERS[0])  # imports and warms what is shared
    times: dict[int, list[float]] = {n: [] for n in _LAYERS}
    for _ in range(args.rounds):
        for n in _LAYERS:
            times[n].append(compile_seconds(n))
    medians = {n: statistics.median(t) for n, t in times.items()}
    for n, seconds in medians.items():
        print(f"{n:3d} layers: {seconds:.2f} s")
    ratio = medians[_LAYERS[1]] / medians[_LAYERS[0]]
    print(f"ratio {ratio:.2f}")
    print(json.dumps({"seconds": medians, "ratio": ratio}))


if __name__ == "__main__":
    main()
