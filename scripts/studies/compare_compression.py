"""Compressed models beside the one that they came from, on text that compression did not see: a table and one JSON line.

Each model is a run or checkpoint; `zeroed` in every table is the original with all routed experts zeroed, which a model that
can judge (judge_model.py) must not survive. Changes are paired by window, with 95% intervals. With several originals
(`--seeds`) a line a model gives the mean over them, with Student's interval.

Example: python scripts/studies/compare_compression.py runs/judge-0 --data runs/judge-0-text/heldout.txt w4=out/w4-0
         python scripts/studies/compare_compression.py runs/judge-{} --data runs/judge-{}-text/heldout.txt w4=out/w4-{}
             --seeds 0 1 2 --picture docs/compression.png
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import matplotlib
import numpy as np
from flax import nnx
from matplotlib.figure import Figure
from scipy import stats

from dsv3_jax.checkpoint.load import load, load_with_config
from dsv3_jax.compression.measure import compare, measuring_batches
from dsv3_jax.compression.profile import known_profiles, load_profile
from dsv3_jax.compression.sizes import compressed_size, plain_bytes, size_of
from dsv3_jax.config import load_config
from dsv3_jax.model.names import variables_by_name
from dsv3_jax.model.parameters import ROUTED_EXPERTS, kind_of
from dsv3_jax.model.transformer import Transformer

_CONFIGS = Path(__file__).resolve().parents[2] / "configs"
_SHOWN = {"loss_change": "loss", "kl": "KL", "top1_kept": "top-1 kept", "agreement": "agree", "mtp_acceptance": "MTP accepted"}


def without_experts(model: Transformer) -> Transformer:
    """A copy whose routed experts all give zero, those of MTP modules, too."""
    copy = nnx.clone(model)
    for name, variable in variables_by_name(nnx.state(copy, nnx.Param)).items():
        if kind_of(variable) == ROUTED_EXPERTS and name.endswith("w_down_EMD"):
            variable.set_value(jnp.zeros_like(variable.get_value()))
    return copy


def measure(original: str, data: str, paths: dict[str, str], windows: int | None = None) -> dict[str, dict[str, Any]]:
    """{name: figures} of the original, of the control, and of the models at these paths, on the documents of `data`."""
    loaded = load_with_config(original)
    config = loaded.config
    store = loaded.read_text(data)
    size = config.data.batch_size
    batches = list(measuring_batches(store, config.data.seq_len, len(loaded.model.mtp), size))
    models = {"original": loaded.model, "zeroed": without_experts(loaded.model)}
    models |= {name: load(path) for name, path in paths.items()}
    found = compare(loaded.model, models, batches if windows is None else batches[: -(-windows // size)])
    return {name: comparison.figures() for name, comparison in found.items()}


def single(figures: dict[str, Any], key: str) -> dict[str, float]:
    """A figure with its interval; of MTP modules the first's."""
    return figures[key][0] if isinstance(figures[key], list) else figures[key]


def over_seeds(found: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean over seeds and the half-width of its 95% interval, by model and figure."""

    def mean(name: str, key: str) -> dict[str, float]:
        values = [single(figures[name], key)["value"] for figures in found]
        half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values) if len(values) > 1 else float("nan")
        return {"value": float(np.mean(values)), "ci95": float(half)}

    return {name: {key: mean(name, key) for key in _SHOWN if found[0][name][key]} for name in found[0]}


def _line(name: str, figures: dict[str, Any]) -> str:
    def shown(key: str) -> str:
        if not figures.get(key):
            return "-"
        found = single(figures, key)
        value, ci95 = found["value"], found["ci95"]
        if key == "kl":
            return f"{value:.5f} +- {ci95:.5f}"
        return f"{value:{'+.2%' if key == 'loss_change' else '.2%'}} +- {ci95:.2%}"

    return f"{name:14s}" + "".join(f"{shown(key):>22s}" for key in _SHOWN)


def draw(table: dict[str, Any], picture: Path) -> None:
    """Top-1 that is kept over how much smaller the 671B model becomes by the profiles of the models' names, and the control."""
    matplotlib.use("Agg")
    released = load_config(_CONFIGS / "v3_671b.yaml").model
    whole = size_of(released, plain_bytes).main
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    ratios = {name: whole / compressed_size(released, load_profile(name)).main for name in set(table) & set(known_profiles())}
    for i, (name, smaller) in enumerate(sorted(ratios.items(), key=lambda item: item[1])):
        kept = single(table[name], "top1_kept")
        axes.errorbar(smaller, 100 * kept["value"], 100 * kept["ci95"], marker="o", capsize=3)
        axes.annotate(name, (smaller, 100 * kept["value"]), xytext=(6, -14 if i % 2 else 6), textcoords="offset points")
    control = 100 * single(table["zeroed"], "top1_kept")["value"]
    axes.text(0.02, 0.04, f"the control, every routed expert zeroed: {control:.0f}%", transform=axes.transAxes)
    axes.set(xlabel="671B model in bfloat16 over compressed", ylabel="top-1 kept on text not seen, %")
    axes.grid(alpha=0.3)
    axes.margins(x=0.15, y=0.25)
    figure.savefig(picture, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", help="a run or checkpoint; {} stands for a seed")
    parser.add_argument("models", nargs="*", help="NAME=CHECKPOINT")
    parser.add_argument("--data", required=True, help="what data.path may be: text that compression did not see")
    parser.add_argument("--seeds", nargs="+", default=[""])
    parser.add_argument("--windows", type=int, help="at most so many")
    parser.add_argument("--picture", type=Path, help="a PNG of size against top-1, for models named as their profiles")
    args = parser.parse_intermixed_args()  # models may follow options
    found = []
    for seed in args.seeds:
        paths = dict(model.format(seed).split("=", 1) for model in args.models)
        found.append(measure(args.original.format(seed), args.data.format(seed), paths, args.windows))
        if len(args.seeds) > 1:
            print(json.dumps({"seed": seed} | found[-1]), flush=True)
    table: dict[str, Any] = found[0] if len(found) == 1 else over_seeds(found)
    print(f"{'':14s}" + "".join(f"{title:>22s}" for title in _SHOWN.values()))
    for name, figures in table.items():
        print(_line(name, figures))
    print(json.dumps(table))
    if args.picture:
        draw(table, args.picture)


if __name__ == "__main__":
    main()
