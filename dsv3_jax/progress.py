"""What a person sees of work that takes time: a live bar on a terminal, plain lines in a pipe."""

import sys
import time
from threading import Lock

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)  # fmt: skip

_LINE_EVERY_S = 5.0


def human(x: float, unit: str = "") -> str:
    """1234567 -> '1.23M'."""
    for size, suffix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= size:
            return f"{x / size:.3g}{suffix}{unit}"
    return f"{x:.3g}{unit}"


class ProgressReporter:
    """Of training, on standard output. Use as a context manager; `update` after every step, `say` for everything else.

    `quiet` shows nothing.
    """

    def __init__(self, steps: int, done: int, quiet: bool = False):
        self._steps = steps
        self._console = Console(file=sys.stdout, highlight=False, soft_wrap=True, quiet=quiet)
        self._live: Progress | None = None
        self._last_line = 0.0
        if self._console.is_terminal and not quiet:
            self._live = Progress(
                TextColumn("[bold]train"), BarColumn(bar_width=24), MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"), TextColumn("ETA"), TimeRemainingColumn(),
                console=self._console,
            )  # fmt: skip
            self._task = self._live.add_task("train", total=steps, completed=done, status="compiling")

    def __enter__(self) -> "ProgressReporter":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_) -> None:
        if self._live:
            self._live.stop()

    def say(self, text: str) -> None:
        self._console.print(text, markup=False)

    def update(self, step: int, row: dict[str, float], flops_per_s: float) -> None:
        status = (
            f"loss {row['loss']:.4f}  {human(row['tokens_per_s'])} tokens/s  {human(flops_per_s, 'FLOP/s')}  "
            f"expert load {row['max_load']:.2f}"
        )
        if self._live:
            self._live.update(self._task, completed=step, status=status)
            return
        now = time.monotonic()
        if step == 1 or step == self._steps or now - self._last_line >= _LINE_EVERY_S:
            self._last_line = now
            left = (self._steps - step) * row["step_time_s"]
            self.say(f"step {step}/{self._steps}  {status}  ETA {left:.0f} s")


class BytesProgress:
    """Of a copy, on standard error. Use as a context manager and `advance` by bytes. `quiet` shows nothing."""

    def __init__(self, what: str, total: int, done: int = 0, quiet: bool = False):
        self._what, self._total, self._done, self._before = what, total, done, done
        self._counting = Lock()
        self._console = Console(file=sys.stderr, highlight=False, soft_wrap=True, quiet=quiet)
        self._live: Progress | None = None
        if self._console.is_terminal and not quiet:
            columns = BarColumn(bar_width=24), DownloadColumn(), TransferSpeedColumn(), TextColumn("ETA"), TimeRemainingColumn()
            self._live = Progress(TextColumn(f"[bold]{what}"), *columns, console=self._console)
            self._task = self._live.add_task(what, total=total, completed=done)

    def __enter__(self) -> "BytesProgress":
        self._began = self._last_line = time.monotonic()
        if self._done:
            self._console.print(f"{self._what}: goes on at {human(self._done, 'B')} of {human(self._total, 'B')}")
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_) -> None:
        if self._live:
            self._live.stop()

    def advance(self, size: int) -> None:
        """From any thread."""
        with self._counting:
            self._done += size
        if self._live:
            self._live.update(self._task, completed=self._done)
            return
        now = time.monotonic()
        if self._done >= self._total or now - self._last_line >= _LINE_EVERY_S:
            self._last_line = now
            rate = (self._done - self._before) / max(now - self._began, 1e-9)
            left = (self._total - self._done) / max(rate, 1.0)
            self._console.print(
                f"{self._what}: {human(self._done, 'B')} of {human(self._total, 'B')}, {human(rate, 'B/s')}, ETA {left:.0f} s"
            )
