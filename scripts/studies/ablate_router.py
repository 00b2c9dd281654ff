"""Bias balancing on and off: expert load on held-out batches after 200 steps of configs/tiny.yaml on the default corpus.

Prints max/mean load (the worst layer's busiest expert; 1 is perfect) and one JSON line.
Example: python scripts/studies/ablate_router.py --steps 200
"""

import argparse
import json
import tempfile
from pathlib import Path

from dsv3_jax.config import load_config
from dsv3_jax.training.evaluate import evaluate_store
from dsv3_jax.training.loop import train
from dsv3_jax.training.step import make_eval_step

_ROOT = Path(__file__).resolve().parents[2]
_VARIANTS = {"balanced": [], "off": ["train.bias_update_speed=0", "train.sequence_balance_alpha=0"]}


def held_out_load(steps: int, overrides: list[str]) -> float:
    config = load_config(
        _ROOT / "configs" / "tiny.yaml",
        [f"train.steps={steps}", "train.eval_every=1000000", *overrides],
    )
    with tempfile.TemporaryDirectory() as root:
        result = train(config, Path(root))
        evaluation = evaluate_store(
            make_eval_step(config), result.state.params, result.state.router_bias, result.corpus.validation,
            config.data.seq_len, config.data.batch_size,
        )  # fmt: skip
    return evaluation.max_load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    loads = {name: held_out_load(args.steps, overrides) for name, overrides in _VARIANTS.items()}
    for name, load in loads.items():
        print(f"{name:10s} max/mean expert load on held-out text {load:.2f}")
    print(json.dumps(loads))


if __name__ == "__main__":
    main()
