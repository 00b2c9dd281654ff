"""A run's records: rows of metrics.jsonl and its like, written while it trains and read afterwards."""

import contextlib
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter

from dsv3_jax.records import Record, Records, last_records, number, reopen
from dsv3_jax.runs.directory import RunDirectory
from dsv3_jax.streams import say


def is_row(record: Record) -> bool:
    """Whether a record is a row of metrics.jsonl, decisions.jsonl or routing.jsonl: all of them name their step."""
    return type(record.get("step")) is int and 0 <= record["step"] < 2**63


class _BoardFile:
    """TensorBoard's file, whose errors end nothing: its thread would die of one, and training then wait for it for ever."""

    def __init__(self, writer: Any):
        self._writer, self._failed = writer, False

    def _try(self, use: Callable[[], Any]) -> None:
        try:
            if not self._failed:
                use()
        except OSError as error:
            self._failed = True
            say(f"TensorBoard's file ends here: {error.strerror or error}", sys.stderr)

    def write_event(self, event: Any) -> None:
        self._try(lambda: self._writer.write_event(event))

    def flush(self) -> None:
        self._try(self._writer.flush)

    def close(self) -> None:
        self._try(self._writer.close)


def _board(directory: Path, purge_step: int | None) -> SummaryWriter:
    board = SummaryWriter(str(directory), purge_step=purge_step)
    events: Any = board.file_writer.event_writer  # type: ignore[union-attr]
    events._ev_writer = events._worker._record_writer = _BoardFile(events._ev_writer)
    return board


class MetricsWriter:
    """Writes a run's metrics.jsonl (a row per step), decisions.jsonl (a row per change of precision), routing.jsonl (a row per
    evaluation: tokens per expert of each layer) and TensorBoard's files.

    A resumed run drops the rows after its checkpoint; one that begins at step 0 again, which may be because a checkpoint was
    lost, sets its files with rows aside: `aside` is where those of metrics.jsonl are then. `dropped` describes them: how many
    `steps` are done again, the `seconds` they took, and when the `last` one ended (seconds since 1970); None if there are none.
    """

    def __init__(self, run: RunDirectory, resumed_step: int):
        def is_late(row: Record) -> bool:
            return row["step"] > resumed_step

        self.aside: Path | None = None
        if not resumed_step and last_row(run.metrics_file).get("step"):
            self.aside = _set_aside(run)
        self._file, again = reopen(run.metrics_file, is_row, is_late)
        if self.aside is not None:
            again = read_rows(self.aside)
        seconds, last = sum(number(row, "step_time_s") for row in again), max((number(row, "time") for row in again), default=0)
        self.dropped = {"steps": len(again), "seconds": seconds, "last": last or None} if again else None
        self._decisions, _ = reopen(run.decisions_file, is_row, is_late)
        self._routing, _ = reopen(run.routing_file, is_row, is_late)
        self._board = _board(run.tensorboard, purge_step=resumed_step + 1 if resumed_step else None)

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
        with contextlib.ExitStack() as all_of_them:  # also after one that fails
            for file in (self._file, self._decisions, self._routing, self._board):
                all_of_them.callback(file.close)


def _set_aside(run: RunDirectory) -> Path:
    """Rename the files with rows to NAME.before-N, one N for all; returns where metrics.jsonl is then."""
    files = [file for file in (run.decisions_file, run.routing_file, run.metrics_file) if file.exists()]

    def aside(file: Path, number: int) -> Path:
        return file.with_name(f"{file.name}.before-{number}")

    number = next(n for n in itertools.count(1) if not any(aside(file, n).exists() for file in files))
    for file in files:
        file.rename(aside(file, number))
    return aside(run.metrics_file, number)


def read_rows(path: Path) -> list[Record]:
    """All rows of metrics.jsonl or its like that are sound; a file that is missing has none."""
    return list(Records(path, is_row))


def last_row(path: Path) -> Record:
    """The last sound row of metrics.jsonl or its like, read from the file's end; {} if there is none."""
    return next(iter(last_records(path, is_row)), {})
