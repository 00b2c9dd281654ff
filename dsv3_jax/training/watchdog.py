"""Aborts a process in which no step ends in time: a stuck rank keeps its heartbeat, and its peers would wait for ever."""

import contextlib
import faulthandler
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from dsv3_jax.files import write_atomically

_MEDIANS = 10  # a step that takes this many times the median counts as stuck
_REMEMBERED = 50  # last steps, of which the median is taken
_LONGEST_S = 1e9  # that the clock takes; a longer time is no limit either


class Watchdog:
    """Prints every thread's stack and exits with code 1 if no step ends within max(10 median steps, `stuck_after_s`).

    The clock is faulthandler's thread, which needs no interpreter lock: it also notices native code that holds the lock.
    `slow` allows `slow_s` for what takes longer than a step (start, evaluation, waiting for a save). A context manager.
    """

    def __init__(self, stuck_after_s: float, slow_s: float, enabled: bool = True):
        self._floor, self._slow, self._enabled = stuck_after_s, slow_s, enabled
        self._file: Path | None = None
        self._steps: deque[float] = deque(maxlen=_REMEMBERED)
        self.slow()

    def step_ended(self, seconds: float) -> None:
        """A step that took `seconds` has ended, and the next one begins."""
        self._steps.append(seconds)
        self.step_begins()

    def step_begins(self) -> None:
        """Something `slow` is over. Before the first step has been timed, its limit stays."""
        if self._steps:
            self._allow(max(_MEDIANS * statistics.median(self._steps), self._floor))

    def slow(self, file: Path | None = None) -> None:
        """Something slower than a step begins.

        From here on the deadline is written into `file` (seconds since 1970), if one is given here or was before: a supervisor
        kills a process that outlives it.
        """
        self._file = file or self._file
        self._allow(max(self._slow, self._floor))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Something of which nobody knows how long it takes, such as tokenising a corpus; what follows it is slow."""
        if self._enabled:
            faulthandler.cancel_dump_traceback_later()
        yield
        self.slow()

    def _allow(self, seconds: float) -> None:
        if not self._enabled:
            return
        seconds = min(seconds, _LONGEST_S)
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or sys.stderr)
        if self._file is not None:
            write_atomically(self._file, f"{time.time() + seconds:.1f}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        if self._enabled:
            faulthandler.cancel_dump_traceback_later()
            if self._file is not None:
                with contextlib.suppress(OSError):  # a disk that has failed is reported by what failed on it first
                    self._file.unlink(missing_ok=True)
