"""A run's events.jsonl, from which `dsv3 report` is made. Process 0 and the supervisor append to it."""

import json
import os
import time
from pathlib import Path
from typing import Any

from dsv3_jax.records import Record, number

LATEST = 2.0**33  # seconds since 1970, in the year 2242: times after it are damage, and so are steps that take so long


def is_event(record: Record) -> bool:
    """Whether a record is an event: all of them have a name and a possible time."""
    return isinstance(record.get("event"), str) and 0 <= number(record, "time", -1.0) <= LATEST


class EventLog:
    """Appends one JSON object per line: `time` (seconds since 1970), `event`, and that event's fields.

    A supervisor writes `rehearsed` (workers, seconds, well), `launch` (attempt, workers, hosts), `failure` (cause, host) and
    `done` (code). Process 0 writes `started` (processes, devices, mesh), `restored` (step; dropped, see `MetricsWriter`; local:
    the share of the state that was read from `checkpoint.local_dir`), `compiled` (step: the first one, which now begins),
    `saved` (step, stall_s: how long training waited, steps_s: how long all steps until then took),
    `corpus_changed` (what: accepted by data.allow_changed) and `ended` (step).
    """

    def __init__(self, file: Path, enabled: bool = True):
        self._file, self._enabled = file, enabled

    def write(self, event: str, **what: Any) -> None:
        if self._enabled:
            line = json.dumps({"time": round(time.time(), 3), "event": event} | what) + "\n"
            with open(self._file, "a+b") as file:
                cut = file.tell() > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n"  # by a crash
                file.write(b"\n" * cut + line.encode())
