"""The cache of what takes long to make from a corpus.

An entry is a directory named by a hash of everything that decides its contents; it is written beside its final path and
renamed, so that it is complete or absent.
"""

import contextlib
import fcntl
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from dsv3_jax.config import DataConfig
from dsv3_jax.errors import UserError
from dsv3_jax.files import expand_home, user_cache

_LOCK = "lock"  # in an entry that is being made, held by the process that makes it
_NEW_S = 60.0  # until then a scratch directory may not yet be locked


def cache_root(config: DataConfig) -> Path:
    """The directory of cache entries: `data.cache_dir`, or one in the user's cache."""
    if config.cache_dir is not None:
        return expand_home(config.cache_dir)
    return user_cache()


def cached(root: Path, key: str, build: Callable[[Path], None]) -> Path:
    """Directory `root/key`, made by `build` in a temporary sibling first if it does not exist."""
    target = root / key
    if target.is_dir():
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(root)
        scratch = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=root))
        lock = open(scratch / _LOCK, "w")  # noqa: SIM115  (closed below)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        raise UserError(f"data.cache_dir: cannot write {root}: {error.strerror}") from None
    try:
        build(scratch)
        (scratch / _LOCK).unlink()
        try:
            scratch.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster, with the same contents
                raise
    except OSError as error:
        raise UserError(f"data.cache_dir: cannot write {target}: {error.strerror}") from None
    finally:
        lock.close()
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _remove_abandoned(root: Path) -> None:
    """Remove what processes that were killed have left of entries that they were making."""
    for lock in root.glob(f".*-*/{_LOCK}"):
        with contextlib.suppress(OSError):  # another process holds it, has finished, or was faster
            if time.time() - lock.stat().st_mtime > _NEW_S:
                with open(lock) as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(lock.parent, ignore_errors=True)
