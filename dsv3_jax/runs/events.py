"""events.jsonl of a run: what happened when, for `dsv3 report`. Every process of the run and its supervisor may append."""

import json
import time
from pathlib import Path
from typing import Any


class EventLog:
    """Appends one object a line: `time` (seconds since 1970), `event` (below), and what belongs to it.

    Of a supervisor: `rehearsed` (workers, seconds, well), `launch` (attempt, workers, hosts), `failure` (cause, host), `done`
    (code). Of process 0: `started` (processes, devices, mesh), `restored` (step; dropped: steps beyond it that are done again,
    their seconds, when the last of them ended; local: the share of its state that came from `checkpoint.local_dir`), `compiled`
    (step: the first one, which now begins), `saved` (step, stall_s), `ended` (step).
    """

    def __init__(self, file: Path, enabled: bool = True):
        self._file, self._enabled = file, enabled

    def write(self, event: str, **what: Any) -> None:
        if self._enabled:
            with open(self._file, "a") as file:
                file.write(json.dumps({"time": round(time.time(), 3), "event": event} | what) + "\n")
