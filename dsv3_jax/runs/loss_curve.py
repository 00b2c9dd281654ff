"""A run's loss curve as a picture."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from dsv3_jax.runs.metrics import read_rows


def plot_loss(metrics_file: Path, png: Path, title: str) -> None:
    """Draw training and held-out loss against tokens, from metrics.jsonl into a PNG."""
    matplotlib.use("Agg")
    rows = read_rows(metrics_file)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    tokens = np.array([row["tokens"] for row in rows]) / 1e6
    axes.plot(tokens, [row["cross_entropy"] for row in rows], linewidth=0.8, alpha=0.7, label="training")
    held_out = [(row["tokens"] / 1e6, row["eval_loss"]) for row in rows if "eval_loss" in row]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), marker="o", label="held out")
    axes.set(xlabel="tokens (millions)", ylabel="cross-entropy (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(png, dpi=120)
