"""What compressing did: compress.json in a compressed checkpoint."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.compression.blocks import Place
from dsv3_jax.compression.layer import LayerResult
from dsv3_jax.compression.parts import MTP, part_of_weight
from dsv3_jax.compression.profile import Profile
from dsv3_jax.data.batch import Batch

REPORT = "compress.json"
LAYERS = "compress-layers.jsonl"  # while a checkpoint is written: what its report will say of the layers that are done
STARVED = 256  # experts that saw fewer tokens are counted


class LayerLog:
    """The lines of the layers that are done, for a process that goes on where one that was killed stopped."""

    def __init__(self, path: Path):
        self._path = path
        self._said: dict[str, dict[str, Any]] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                said = json.loads(line)
                self._said[said["layer"]] = said
            except (ValueError, TypeError, KeyError):  # cut off where the process was killed: the layer is done again
                continue

    def said_of(self, place: Place) -> dict[str, Any] | None:
        """What an earlier process said of a block."""
        return self._said.get(place.name)

    def say(self, place: Place, result: LayerResult, pruning: dict[str, Any]) -> dict[str, Any]:
        """Keep and return a block's line, before its arrays are written."""
        said = _layer(place, result) | ({"pruning": pruning} if pruning else {})
        with self._path.open("a") as file:
            file.write("\n" + json.dumps(said) + "\n")
        return said

    def remove(self) -> None:
        """Once the report holds everything."""
        self._path.unlink(missing_ok=True)


def _layer(place: Place, result: LayerResult) -> dict[str, Any]:
    said: dict[str, Any] = {"layer": place.name, "integer_weights": sorted(result.weights)}
    if result.tokens_E is not None:
        tokens = [int(n) for n in result.tokens_E]
        said["tokens_per_expert"] = tokens
        said["starved_experts"] = sum(n < STARVED for n in tokens)
    if errors := {name: e for name, by in sorted(result.energies.items()) if (e := _output_error(by))}:
        said["output_error"] = errors
    if result.retries:
        said["retries"] = result.retries
    return said


def _output_error(energies: np.ndarray) -> dict[str, float] | None:
    """Relative errors from `gptq.output_energies`, f[3] or, summed over experts, f[E, 3]; None where all outputs are zero."""
    output, error, rounding = np.asarray(energies, np.float64).reshape(-1, 3).sum(0)
    # four digits: more would be those of the order in which a machine sums
    return {"gptq": float(f"{error / output:.4g}"), "rounding": float(f"{rounding / output:.4g}")} if output > 0 else None


def errors_by_part(layers: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """{part: {"gptq": mean over its weights in all layers, "rounding": the same}} of the layers' output errors."""
    found: dict[str, list[dict[str, float]]] = {}
    for line in layers:
        for name, error in line.get("output_error", {}).items():
            part = MTP if line["layer"].startswith("MTP") else part_of_weight(name)
            found.setdefault(part, []).append(error)
    return {part: mean_error(errors) for part, errors in found.items()}


def mean_error(errors: list[dict[str, float]]) -> dict[str, float]:
    """The mean of several weights' output errors."""
    return {by: float(f"{np.mean([e[by] for e in errors]):.4g}") for by in ("gptq", "rounding")}


def report_json(
    profile: Profile, windows: Batch, layers: list[dict[str, Any]], measured: dict[str, Any], sizes: dict[str, Any]
) -> bytes:
    """The content of compress.json.

    `output_error` is the squared error of a weight's output in units of the squared output, on what the weight reads of the
    calibration set (for routed experts on their own tokens, before they are weighted): by GPTQ's codes, and by rounding to the
    nearest number of the same grid.
    """
    report = {
        "profile": dataclasses.asdict(profile),
        "calibration": {
            "windows": windows.rows,
            "tokens": int((windows.segments >= 0).sum()),
            "starved_below": STARVED,
        },
        "measured": measured,
        "sizes": sizes,
        "output_error": errors_by_part(layers),
        "layers": layers,
    }
    return (json.dumps(report, indent=2) + "\n").encode()
