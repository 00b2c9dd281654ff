"""Reading the workers' log files while they are written."""

from collections.abc import Callable
from pathlib import Path
from typing import Self

_TAIL_BYTES = 2**18


class Follower:
    """Passes the new lines of a growing file to `say` whenever `read` is called; as a context manager, also at its end."""

    def __init__(self, path: Path, say: Callable[[str], None]):
        self._path, self._say, self._offset = path, say, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.read()

    def read(self) -> None:
        try:
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:  # the worker has not begun
            return
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        for line in complete.decode(errors="replace").splitlines():
            if not line.startswith("[Gloo]"):  # which prints every connection between CPU processes
                self._say(line)


def tail(path: Path) -> str:
    """The end of a log; '' if there is no file."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


def ended_by_watchdog(log: Path) -> bool:
    """Whether the log ends with the stacks that the watchdog prints (training/watchdog.py) before it ends its process."""
    return "Timeout (" in tail(log)
