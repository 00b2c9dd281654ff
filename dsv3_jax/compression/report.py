"""What compressing did: compress.json in a compressed checkpoint."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from dsv3_jax.compression.blocks import Place
from dsv3_jax.compression.layer import LayerResult
from dsv3_jax.compression.profile import Profile
from dsv3_jax.data.batch import Batch

REPORT = "compress.json"
LAYERS = "compress-layers.jsonl"  # while a checkpoint is written: what its report will say of the layers that are done
_STARVED = 256  # experts that saw fewer tokens are counted


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
        said["starved_experts"] = sum(n < _STARVED for n in tokens)
    if result.retries:
        said["retries"] = result.retries
    return said


def report_json(profile: Profile, windows: Batch, layers: list[dict[str, Any]]) -> bytes:
    """The content of compress.json."""
    report = {
        "profile": dataclasses.asdict(profile),
        "calibration": {"windows": windows.rows, "tokens": int((windows.segments >= 0).sum())},
        "layers": layers,
    }
    return (json.dumps(report, indent=2) + "\n").encode()
