"""What workers print, read from their files while they write them."""

from collections.abc import Callable
from pathlib import Path
from typing import Self

_TAIL_BYTES = 2**18


class Follower:
    """Says each line of a file that grows, when `read` is called. As a context manager it reads the rest at its end."""

    def __init__(self, path: Path, say: Callable[[str], None]):
        self._path, self._say, self._at = path, say, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.read()

    def read(self) -> None:
        try:
            with open(self._path, "rb") as file:
                file.seek(self._at)
                data = file.read()
        except FileNotFoundError:  # the worker has not begun
            return
        whole = data[: data.rfind(b"\n") + 1]
        self._at += len(whole)
        for line in whole.decode(errors="replace").splitlines():
            if not line.startswith("[Gloo]"):  # which connects CPU processes, and reports each connection
                self._say(line)


def tail(path: Path) -> str:
    """The last lines; '' if there is no file."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


def says_stuck(log: Path) -> bool:
    """Whether its process was ended by its watchdog (train/watchdog.py)."""
    return "Timeout (" in tail(log)
