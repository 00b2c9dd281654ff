"""Ends a process in which no step ends in time: a stuck rank keeps its heartbeat, and its peers would wait for ever."""

import faulthandler
import statistics
import sys
import time
from collections import deque
from pathlib import Path
from typing import Self

from dsv3_jax.files import write_whole

_MEDIANS = 10  # a step that takes so many times the median is taken for stuck
_REMEMBERED = 50  # steps


class Watchdog:
    """Where no step ends within max(10 medians, `stuck_after_s`), every thread's stack goes to standard error, and exit code 1.

    The clock is faulthandler's thread, which needs no interpreter lock, so that native code that holds it is noticed too. What
    is slower than a step by nature (start, evaluation, waiting for a save) is given `slow_s` by `slow`. A context manager.
    """

    def __init__(self, stuck_after_s: float, slow_s: float, enabled: bool = True):
        self._floor, self._slow, self._enabled = stuck_after_s, slow_s, enabled
        self._file: Path | None = None
        self._steps: deque[float] = deque(maxlen=_REMEMBERED)
        self.slow()

    def step_ended(self, seconds: float) -> None:
        self._steps.append(seconds)
        self.step_begins()

    def step_begins(self) -> None:
        """After what was `slow`, where steps have been timed."""
        if self._steps:
            self._allow(max(_MEDIANS * statistics.median(self._steps), self._floor))

    def slow(self, file: Path | None = None) -> None:
        """From here on `file` gets the deadline, in seconds since 1970, for a supervisor: it ends who cannot end itself."""
        self._file = file or self._file
        self._allow(max(self._slow, self._floor))

    def _allow(self, seconds: float) -> None:
        if not self._enabled:
            return
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or sys.stderr)
        if self._file is not None:
            write_whole(self._file, f"{time.time() + seconds:.1f}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        if self._enabled:
            faulthandler.cancel_dump_traceback_later()
            if self._file is not None:
                self._file.unlink(missing_ok=True)
