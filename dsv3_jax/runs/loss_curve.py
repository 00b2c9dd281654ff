"""A run's loss curve as a picture."""

import math
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from dsv3_jax.records import Record, Records, number
from dsv3_jax.runs.metrics import is_row


def _has_tokens(row: Record) -> bool:
    return is_row(row) and number(row, "tokens", -1.0) >= 0


def plot_loss(metrics_file: Path, png: Path, title: str) -> None:
    """Draw training and held-out loss against tokens, from metrics.jsonl into a PNG."""
    matplotlib.use("Agg")
    training, held_out = [], []
    for row in Records(metrics_file, _has_tokens):
        millions = number(row, "tokens") / 1e6
        training.append((millions, number(row, "cross_entropy", math.nan)))
        if "eval_loss" in row:
            held_out.append((millions, number(row, "eval_loss", math.nan)))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*np.array(training).reshape(-1, 2).T, linewidth=0.8, alpha=0.7, label="training")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), marker="o", label="held out")
    axes.set(xlabel="tokens (millions)", ylabel="cross-entropy (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(png, dpi=120)
