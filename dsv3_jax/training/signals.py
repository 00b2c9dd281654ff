"""A polite end: the first SIGINT or SIGTERM asks a run to stop after its step, and a second one ends the process at once."""

import contextlib
import signal
from dataclasses import dataclass, field
from typing import Any, Self


@dataclass
class StopRequest:
    """Catches the first SIGINT or SIGTERM while it is entered."""

    signal: int | None = None  # the one that came
    _old: dict[int, Any] = field(default_factory=dict)

    @property
    def came(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> Self:
        with contextlib.suppress(ValueError):  # only the main thread may set handlers (a notebook's worker may not)
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, _frame) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old.clear()

    def __exit__(self, *_) -> None:
        self._restore()
