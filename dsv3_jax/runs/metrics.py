"""A run's records: rows of metrics.jsonl and its like, written while it trains and read afterwards."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tensorboardX import SummaryWriter

from dsv3_jax.files import write_atomically
from dsv3_jax.runs.directory import RunDirectory

_TAIL_BYTES = 2**16  # longer than a row


def _reopen(path: Path, resumed_step: int) -> tuple[TextIO, list[dict[str, Any]]]:
    """The file, open to append to, without the rows after `resumed_step`; and those rows."""
    rows = read_rows(path)
    kept = [row for row in rows if row["step"] <= resumed_step]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))
    return open(path, "a", buffering=1), rows[len(kept) :]


class MetricsWriter:
    """Writes a run's metrics.jsonl (a row per step), decisions.jsonl (a row per change of precision), routing.jsonl (a row per
    evaluation: tokens per expert of each layer) and TensorBoard's files.

    A resumed run drops the rows after its checkpoint. `dropped` describes those of metrics.jsonl: how many `steps` are done
    again, the `seconds` they took, and when the `last` one ended (seconds since 1970); None if there are none.
    """

    def __init__(self, run: RunDirectory, resumed_step: int):
        self._file, again = _reopen(run.metrics_file, resumed_step)
        seconds = sum(row["step_time_s"] for row in again)
        self.dropped = {"steps": len(again), "seconds": seconds, "last": again[-1].get("time")} if again else None
        self._decisions, _ = _reopen(run.decisions_file, resumed_step)
        self._routing, _ = _reopen(run.routing_file, resumed_step)
        self._board = SummaryWriter(str(run.path / "tensorboard"), purge_step=resumed_step + 1 if resumed_step else None)

    def write(self, row: dict[str, float]) -> None:
        """Append a step's row; all of its values but `step` go to TensorBoard too."""
        self._file.write(json.dumps(row) + "\n")
        for key, value in row.items():
            if key != "step" and value is not None:
                self._board.add_scalar(key, value, int(row["step"]))

    def write_decisions(self, lines: list[dict[str, Any]]) -> None:
        """Append changes of precision, as `precision.controller.log_lines` describes them."""
        self._decisions.writelines(json.dumps(line) + "\n" for line in lines)

    def write_routing(self, step: int, load: Sequence[Any]) -> None:
        """Append how many of a step's tokens each expert got: `load` has f32[layers, E] or f32[E] arrays, one per stack."""
        layers = [row.astype(int).tolist() for a in map(np.asarray, load) for row in a.reshape(-1, a.shape[-1])]
        self._routing.write(json.dumps({"step": step, "load": layers}) + "\n")

    def close(self) -> None:
        self._file.close()
        self._decisions.close()
        self._routing.close()
        self._board.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a .jsonl file; a line that a crash has cut off is left out, and a file that is missing has none."""
    rows = []
    if path.exists():
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    return rows


def last_row(path: Path) -> dict[str, Any]:
    """The last complete row of a .jsonl file, read from the file's end; {} if there is none."""
    if not path.exists():
        return {}
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        lines = file.read().splitlines()
    for line in reversed(lines):
        try:
            return json.loads(line)
        except json.JSONDecodeError:
            continue  # a crash cut it off, or reading began inside it
    return {}
