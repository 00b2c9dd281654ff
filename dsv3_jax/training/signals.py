"""A polite end: the first SIGINT, SIGTERM or SIGHUP asks a run to stop after its step, a second one ends the process at once.

But not a second SIGHUP: a terminal that goes, its shell and the kernel may each send one.
"""

import contextlib
import signal
from dataclasses import dataclass, field
from typing import Any, Self

from dsv3_jax.cluster.stop import stop_signals


@dataclass
class StopRequest:
    """Catches the first signal that asks to stop while it is entered."""

    signal: int | None = None  # the one that came
    _old: dict[int, Any] = field(default_factory=dict)

    @property
    def came(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> Self:
        with contextlib.suppress(ValueError):  # only the main thread may set handlers (a notebook's worker may not)
            for number in stop_signals():
                self._old[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, _frame) -> None:
        self.signal = self.signal or number
        self._restore(set(self._old) - {signal.SIGHUP})

    def _restore(self, numbers: set[int]) -> None:
        for number in numbers:
            signal.signal(number, self._old.pop(number))

    def __exit__(self, *_) -> None:
        self._restore(set(self._old))
