"""Directories that appear complete or not at all: written beside their final path, under a lock, and renamed."""

import fcntl
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from dsv3_jax.errors import UserError

_LOCK = "lock"


def resolved(target: Path) -> Path:
    """Where a new directory will lie: without `..` and links, which no directory can be renamed to."""
    return Path(os.path.realpath(target))


def scratch_of(target: Path) -> Path:
    """The directory beside `target` in which it is written."""
    target = resolved(target)
    return target.with_name(f".{target.name}.partial")


@dataclass(frozen=True)
class Claimed:
    """A scratch directory that this process alone may write."""

    target: Path
    scratch: Path
    lock: IO

    def clear(self) -> None:
        """Remove everything in the scratch directory but the lock."""
        for path in self.scratch.iterdir():
            if path.name != _LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def publish(self, directory: Path) -> None:
        """Rename `directory`, within the scratch directory, to the target."""
        if self.target.exists():  # an empty directory, or `claim` would have refused it
            self.target.rmdir()
        directory.rename(self.target)
        self.drop()

    def drop(self) -> None:
        """Remove the scratch directory and release its lock."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.lock.close()


def claim(target: Path) -> Claimed:
    """Lock the scratch directory of `target`, which still holds what a writer that was killed left in it.

    Raises `UserError` if the target exists (and is no empty directory), or if another process is writing it.
    """
    target, scratch = resolved(target), scratch_of(target)
    if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists already; choose another directory or remove it")
    scratch.mkdir(parents=True, exist_ok=True)
    lock = (scratch / _LOCK).open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise UserError(f"{target} is being written by another process") from None
    return Claimed(target, scratch, lock)
