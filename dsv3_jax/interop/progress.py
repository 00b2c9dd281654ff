"""What a person sees of a long copy: a live bar on a terminal, plain lines in a pipe. On standard error."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

_LINE_EVERY_S = 5.0


class BytesProgress:
    """Use as a context manager and `advance` by bytes. `quiet` shows nothing."""

    def __init__(self, what: str, total: int, done: int = 0, quiet: bool = False):
        self._what, self._total, self._done, self._before = what, total, done, done
        self._console = Console(file=sys.stderr, highlight=False, soft_wrap=True, quiet=quiet)
        self._live: Progress | None = None
        if self._console.is_terminal and not quiet:
            columns = BarColumn(bar_width=24), DownloadColumn(), TransferSpeedColumn(), TextColumn("ETA"), TimeRemainingColumn()
            self._live = Progress(TextColumn(f"[bold]{what}"), *columns, console=self._console)
            self._task = self._live.add_task(what, total=total, completed=done)

    def __enter__(self) -> "BytesProgress":
        self._began = self._last_line = time.monotonic()
        if self._done:
            self._console.print(f"{self._what}: goes on at {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB")
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_) -> None:
        if self._live:
            self._live.stop()

    def advance(self, size: int) -> None:
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
                f"{self._what}: {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB, {rate / 1e9:.2f} GB/s, ETA {left:.0f} s"
            )
