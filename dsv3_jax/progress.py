"""What a person sees: consoles for tables and text, a live bar on a terminal, plain lines in a pipe."""

import re
import sys
import time
from threading import Lock
from typing import IO, Any, Self, cast

from rich import progress as columns
from rich.console import Console
from rich.progress import Progress, ProgressColumn
from rich.text import Text

from dsv3_jax.streams import forgiving

_LINE_EVERY_S = 5.0
_UNWRAPPED = 10_000  # columns: more than any table or line has
_LONGEST_LINE = 2000  # characters of an error
# control characters but tab and newline, those that turn the direction of text, and halves of characters, which no stream takes
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Text from anywhere as it may go to a terminal: what would control it is written out, such as \\x1b."""
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def one_line(text: str) -> str:
    """Text from anywhere in one line, `printable`, and without the rest where it is longer than anybody reads."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]}... ({len(line):,} characters)"


class _PlainConsole(Console):
    """Takes every string, also a table's cell or title, as text: nothing in it is markup, an emoji's name or a control code."""

    def render_str(self, text: str, **style: Any) -> Text:
        style |= {"markup": False, "emoji": False}
        return super().render_str(printable(text), **style)


def make_console(file: IO[str] | None = None, quiet: bool = False, **options: Any) -> Console:
    """A rich console on `file` (standard output if None): as wide as a terminal, and in a pipe or file never wrapped.

    Strings are printed as they are, whatever file or stranger they came from, and lost where nobody reads any more. `options`
    go to rich's `Console`.
    """
    out = cast(IO[str], forgiving(sys.stdout if file is None else file))
    width = None if out.isatty() else _UNWRAPPED
    return _PlainConsole(**{"file": out, "highlight": False, "quiet": quiet, "width": width, **options})


def human(x: float, unit: str = "") -> str:
    """1234567 -> '1.23M'."""
    for size, suffix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= size:
            return f"{x / size:.3g}{suffix}{unit}"
    return f"{x:.3g}{unit}"


class _Reporter:
    """A bar with the columns `shown` on a terminal, lines elsewhere. A context manager. `quiet` shows nothing."""

    def __init__(self, file: IO[str], what: str, shown: tuple[ProgressColumn, ...], total: int, done: int, quiet: bool):
        self._console = make_console(file, quiet)
        self._live: Progress | None = None
        self._last_line = 0.0
        if self._console.is_terminal and not quiet:
            bar = (
                columns.TextColumn(f"[bold]{what}"), columns.BarColumn(bar_width=24), *shown,
                columns.TextColumn("ETA"), columns.TimeRemainingColumn(),
            )  # fmt: skip
            self._live = Progress(*bar, console=self._console)
            self._task = self._live.add_task(what, total=total, completed=done, status="compiling")

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_) -> None:
        if self._live:
            self._live.stop()

    def say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)

    def _is_time(self) -> bool:
        """Whether the next line of a pipe is due."""
        now = time.monotonic()
        due = now - self._last_line >= _LINE_EVERY_S
        if due:
            self._last_line = now
        return due


class ProgressReporter(_Reporter):
    """Progress of training, on standard output: `update` after every step, `say` for everything else."""

    def __init__(self, steps: int, done: int, quiet: bool = False):
        self._steps = steps
        shown = columns.MofNCompleteColumn(), columns.TextColumn("{task.fields[status]}", markup=False)
        super().__init__(sys.stdout, "train", shown, steps, done, quiet)

    def update(self, step: int, row: dict[str, float], flops_per_s: float) -> None:
        """Show a step's row of metrics.jsonl."""
        status = (
            f"loss {row['loss']:.4f}  {human(row['tokens_per_s'])} tokens/s  {human(flops_per_s, 'FLOP/s')}  "
            f"expert load {row['max_load']:.2f}"
        )
        if self._live:
            self._live.update(self._task, completed=step, status=status)
        elif self._is_time() or step in (1, self._steps):
            left = (self._steps - step) * row["step_time_s"]
            self.say(f"step {step}/{self._steps}  {status}  ETA {left:.0f} s")


class BytesProgress(_Reporter):
    """Progress of a copy of `total` bytes, on standard error."""

    def __init__(self, what: str, total: int, done: int = 0, quiet: bool = False):
        self._what, self._total, self._done, self._before = what, total, done, done
        self._counting = Lock()
        super().__init__(sys.stderr, what, (columns.DownloadColumn(), columns.TransferSpeedColumn()), total, done, quiet)
        self._began = self._last_line = time.monotonic()
        if done:
            self.say(f"{what}: goes on at {human(done, 'B')} of {human(total, 'B')}")

    def advance(self, size: int) -> None:
        """`size` more bytes are done. Any thread may call this."""
        with self._counting:
            self._done += size
        if self._live:
            self._live.update(self._task, completed=self._done)
        elif self._is_time() or self._done >= self._total:
            rate = (self._done - self._before) / max(time.monotonic() - self._began, 1e-9)
            left = (self._total - self._done) / max(rate, 1.0)
            self.say(
                f"{self._what}: {human(self._done, 'B')} of {human(self._total, 'B')}, {human(rate, 'B/s')}, ETA {left:.0f} s"
            )
