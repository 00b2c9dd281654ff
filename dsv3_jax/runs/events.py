"""A run's events.jsonl, from which `dsv3 report` is made. Process 0 and the supervisor append to it."""

import json
import os
import time
from pathlib import Path
from typing import Any


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
