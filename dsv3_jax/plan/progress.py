"""What a compiler is doing, while it works."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dsv3_jax.progress import make_console

_LINE_EVERY_S = 10.0


@contextmanager
def progress(topology: str) -> Iterator[Callable[[str, float, float], None]]:
    """Report what the compiler is doing: a status line on a terminal, a line every few seconds elsewhere.

    Yields a function of the phase, seconds and the compiler's memory in GB.
    """
    bar, last = make_console(sys.stderr), [time.monotonic(), ""]
    if bar.is_terminal:
        with bar.status(f"{topology}: starting") as status:
            yield lambda phase, s, gb: status.update(f"{topology}: {phase}, {s:.0f} s, {gb:.1f} GB")
        return

    def line(phase: str, seconds: float, gb: float) -> None:
        if phase != last[1] or time.monotonic() - last[0] >= _LINE_EVERY_S:
            last[:] = time.monotonic(), phase
            print(f"{topology}: {phase}, {seconds:.0f} s, {gb:.1f} GB", file=sys.stderr, flush=True)

    yield line
