"""Loss of low-precision recipes against bf16, with the same seeds and data; prints a table and one JSON line.

configs/tiny.yaml widened so that blocks of 128 are real, on the default corpus. For every seed, the relative difference of
the mean training loss over the last fifth of the steps; over seeds, the mean with its 95% confidence interval (Student's t).
`--outlier S` makes one channel of every layer's normalised input S times larger and its weights S times smaller: the same
function at the start, which is hard on formats that share a scale with that channel. Runs are kept in --out and not repeated.

Example: python scripts/compare_precision.py --steps 1000 --seeds 3 --recipes deepseek fp8_per_tensor
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from scipy import stats

from dsv3_jax.config import Config, load_config
from dsv3_jax.data.batches import PackedWindows, batch_windows
from dsv3_jax.data.store import load_corpus
from dsv3_jax.train.state import TrainState, new_state
from dsv3_jax.train.step import make_train_step

_ROOT = Path(__file__).resolve().parents[1]
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


def losses(recipe: str, seed: int, steps: int, outlier: float) -> list[float]:
    config = config_of(recipe, seed, steps)
    corpus = load_corpus(config.data, config.model.vocab_size)
    source = PackedWindows(corpus.train, config.data.seq_len, 1, seed, shuffle=True)
    state = new_state(config)
    state = with_outlier(state, outlier) if outlier != 1 else state
    step, found = make_train_step(config), []
    for i in range(steps):
        windows = [source[w] for w in batch_windows(config.data.batch_size, i)]
        batch: Any = {name: np.stack([w[name] for w in windows]) for name in windows[0]}
        state, metrics = step(state, batch)
        found.append(float(metrics.objective.cross_entropy))
        if (i + 1) % 100 == 0:
            print(f"{recipe} seed {seed}: step {i + 1}/{steps}, loss {np.mean(found[-50:]):.4f}", flush=True)
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
    parser.add_argument("--outlier", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=Path("runs/compare_precision"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    runs = {}
    for recipe in ["bf16", *args.recipes]:
        for seed in range(args.seeds):
            kept = args.out / f"{recipe}-seed{seed}-steps{args.steps}-outlier{args.outlier:g}.json"
            if not kept.exists():
                kept.write_text(json.dumps(losses(recipe, seed, args.steps, args.outlier)))
            runs[recipe, seed] = json.loads(kept.read_text())
    found = {recipe: compare(runs, recipe, args.seeds) for recipe in args.recipes}
    print(f"loss against bf16 over the last {args.steps // 5} of {args.steps} steps, {args.seeds} seeds:")
    for recipe, row in found.items():
        print(f"  {recipe:16s} {row['mean_percent']:+.3f}% +- {row['ci95_percent']:.3f}%")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
