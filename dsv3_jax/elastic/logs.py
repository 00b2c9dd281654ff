"""Reading the workers' log files while they are written."""

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Self

from dsv3_jax.progress import printable

_TAIL_BYTES = 2**18
_PIECE_BYTES = 2**20  # read at a time, and of a line
_RECENT = 20


class Follower:
    """Passes the new lines of a growing file to `say` whenever `read` is called; as a context manager, also at its end.

    `recent` are the last of them. A file that cannot be read has no new lines.
    """

    def __init__(self, path: Path, say: Callable[[str], None]):
        self._path, self._say, self._offset = path, say, 0
        self.recent: deque[str] = deque(maxlen=_RECENT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.read()

    def read(self) -> None:
        try:
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                while self._pass_on(file.read(_PIECE_BYTES)):
                    file.seek(self._offset)
        except OSError:  # the worker has not begun, or a disk fails, which must not end what is going on
            return

    def _pass_on(self, data: bytes) -> bool:
        """Pass on the complete lines in `data`; False if there is none yet. A line without an end comes in pieces."""
        complete = data if len(data) == _PIECE_BYTES and b"\n" not in data else data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        for line in complete.decode(errors="replace").splitlines():
            if not line.startswith("[Gloo]"):  # which prints every connection between CPU processes
                self._say(printable(line))
                self.recent.append(printable(line))
        return bool(complete)


def tail(path: Path) -> str:
    """The end of a log; '' if there is none that can be read."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def ended_by_watchdog(log: Path) -> bool:
    """Whether the log ends with the stacks that the watchdog prints (training/watchdog.py) before it ends its process."""
    return "Timeout (" in tail(log)
