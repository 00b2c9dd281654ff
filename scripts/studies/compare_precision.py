"""Loss of low-precision recipes against bf16, with the same seeds and data; prints a table and one JSON line.

configs/tiny.yaml widened so that blocks of 128 are real, on the default corpus. For every seed, the relative difference of
the mean training loss over the last fifth of the steps; over seeds, the mean with its 95% confidence interval (Student's t).
`--outliers S ...`: what the recipes make of a model that bf16 trained, once one channel of every layer's normalised input is S
times larger and what reads it S times smaller: the same function, but hard on formats that share a scale with that channel.
Runs are kept in --out and not repeated.

Example: python scripts/studies/compare_precision.py --steps 1000 --seeds 3 --recipes deepseek fp8_per_tensor
         python scripts/studies/compare_precision.py --steps 300 --outliers 1e4 1e6 --recipes deepseek fp8_per_tensor
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from scipy import stats

from dsv3_jax.config import Config, load_config
from dsv3_jax.data.batch import stack
from dsv3_jax.data.batches import PackedWindows, batch_windows
from dsv3_jax.data.store import load_corpus
from dsv3_jax.model.layout import Layout
from dsv3_jax.state.train_state import TrainState, new_state
from dsv3_jax.training.step import gradients, make_train_step

_ROOT = Path(__file__).resolve().parents[2]
WIDENED = [
    "model.hidden_size=256", "model.intermediate_size=512", "model.moe_intermediate_size=128", "model.q_lora_rank=128",
    "model.kv_lora_rank=128", "model.num_hidden_layers=3", "model.num_nextn_predict_layers=0", "data.seq_len=128",
    "train.eval_every=1000000",
    # at this rate bf16 is as good as at twice of it, and two runs that differ in rounding alone end 0.1% apart, not 0.8%
    "optim.lr=1e-3", "optim.lr_final=1e-4", "optim.warmup_steps=100",
]  # fmt: skip


def config_of(recipe: str, seed: int, steps: int) -> Config:
    schedule = [f"train.steps={steps}", f"optim.decay_start={steps // 2}", f"optim.decay_steps={steps // 2}"]
    return load_config(
        _ROOT / "configs" / "tiny.yaml", [*WIDENED, *schedule, f"precision.recipe={recipe}", f"train.seed={seed}"]
    )


def with_outlier(state: TrainState, scale: float) -> TrainState:
    """Channel 7 of every block's two normalised inputs `scale` times larger, and what reads it as much smaller."""
    channel = 7
    axis = {"w_q_a_DQ": -2, "w_kv_a_DX": -2, "w_DE": -2, "w_gate_up_D2F": -3, "w_gate_up_ED2M": -3}

    def change(path, variable):
        name, w = path[-1], variable.get_value()
        if path[-2:] in (("attention_norm", "scale"), ("ffn_norm", "scale")):
            return variable.replace(w.at[..., channel].multiply(scale))
        if name not in axis:
            return variable
        at = (Ellipsis, channel, *[slice(None)] * (-axis[name] - 1))
        return variable.replace(w.at[at].divide(scale))

    state.params = nnx.map_state(change, state.params)
    return state


def batches(config: Config, steps: range) -> Iterator[Any]:
    corpus = load_corpus(config.data, config.model.vocab_size)
    source = PackedWindows(corpus.train, config.data.seq_len, 1, config.train.seed, shuffle=True)
    for i in steps:
        windows = [source[w] for w in batch_windows(config.data.batch_size, i)]
        yield stack(windows)


def train(recipe: str, seed: int, steps: int) -> tuple[TrainState, list[float]]:
    """The state after `steps` steps, and every step's loss."""
    config = config_of(recipe, seed, steps)
    state, step, found = new_state(config), make_train_step(config), []
    for batch in batches(config, range(steps)):
        state, metrics = step(state, batch)
        found.append(float(metrics.objective.cross_entropy))
        if len(found) % 100 == 0:
            print(f"{recipe} seed {seed}: step {len(found)}/{steps}, loss {np.mean(found[-50:]):.4f}", flush=True)
    return state, found


def with_outliers(recipes: list[str], scales: list[float], steps: int) -> dict[str, dict[str, float]]:
    """Loss of the next 10 batches by outlier and recipe, after `steps` steps in bf16."""
    trained, _ = train("bf16", 0, steps)
    following = list(batches(config_of("bf16", 0, steps), range(steps, steps + 10)))
    found: dict[str, dict[str, float]] = {}
    for scale in scales:
        state = with_outlier(replace(trained), scale)
        for recipe in ["bf16", *recipes]:
            config = config_of(recipe, 0, steps)
            loss = jax.jit(lambda state, batch, config=config: gradients(config, Layout(), state, batch)[1].cross_entropy)
            losses = [float(loss(state, batch)) for batch in following]
            found.setdefault(f"{scale:g}", {})[recipe] = float(np.mean(losses))
    return found


def compare(runs: dict[tuple[str, int], list[float]], recipe: str, seeds: int) -> dict[str, Any]:
    """Relative difference to bf16 over the last fifth, in percent, with the half-width of its 95% interval."""

    def tail(name, seed):
        found = runs[name, seed]
        return np.mean(found[-len(found) // 5 :])

    differences = [100 * (tail(recipe, s) / tail("bf16", s) - 1) for s in range(seeds)]
    half = stats.t.ppf(0.975, seeds - 1) * np.std(differences, ddof=1) / np.sqrt(seeds) if seeds > 1 else float("nan")
    return {"mean_percent": float(np.mean(differences)), "ci95_percent": float(half), "seeds_percent": differences}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--recipes", nargs="+", default=["deepseek", "fp8_per_tensor"])
    parser.add_argument("--outliers", type=float, nargs="*", default=[], help="instead of comparing whole runs")
    parser.add_argument("--out", type=Path, default=Path("runs/compare_precision"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.outliers:
        found = with_outliers(args.recipes, [1.0, *args.outliers], args.steps)
        for scale, row in found.items():
            print(f"outlier x{scale:8s} " + "  ".join(f"{recipe} {loss:.4f}" for recipe, loss in row.items()))
        print(json.dumps(found))
        return
    runs = {}
    for recipe in ["bf16", *args.recipes]:
        for seed in range(args.seeds):
            kept = args.out / f"{recipe}-seed{seed}-steps{args.steps}.json"
            if not kept.exists():
                kept.write_text(json.dumps(train(recipe, seed, args.steps)[1]))
            runs[recipe, seed] = json.loads(kept.read_text())
    found = {recipe: compare(runs, recipe, args.seeds) for recipe in args.recipes}
    print(f"loss against bf16 over the last {args.steps // 5} of {args.steps} steps, {args.seeds} seeds:")
    for recipe, row in found.items():
        print(f"  {recipe:16s} {row['mean_percent']:+.3f}% +- {row['ci95_percent']:.3f}%")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
