"""Small files: reading those of strangers, atomic writing, and the user's cache directory."""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from dsv3_jax.errors import UserError

# Of a JSON file, a key counting as two: each takes at most 100 bytes once it is parsed. The largest tokenizers have 2 million.
_MOST_VALUES = 3_000_000
_POINTER = b"version https://git-lfs"  # how a file begins that git-lfs has put in the place of another


def open_regular(path: str | Path) -> IO[bytes]:
    """Open a file to read its bytes, if it is a regular one: a pipe would never open, and a device never end.

    Links are followed. Raises `UserError` naming the path and what is wrong.
    """
    try:
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    except IsADirectoryError:
        raise UserError(f"cannot read {path}: it is a directory") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise UserError(f"cannot read {path}: it is no regular file, but a pipe, socket or device")
    return file


def refuse_pointer(path: str | Path, content: bytes) -> None:
    """Raise `UserError` if what a file holds is git-lfs's note about the file that belongs there."""
    if content.startswith(_POINTER):
        raise UserError(f"{path} is a git-lfs pointer and not the file itself; fetch it with `git lfs pull`")


def read_regular(path: str | Path, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes.

    Raises `UserError` as `open_regular`, for a larger one, and for a pointer that git-lfs has put in the place of a file.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise UserError(f"cannot read {path}: it has {size:,} bytes, and at most {most:,} are expected")
        try:
            content = file.read(size)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
    refuse_pointer(path, content)
    return content


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def parse_json(content: bytes, where: str | Path, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """JSON in UTF-8, with or without a byte order mark; `where` names it in errors, `pairs` makes objects instead of dict.

    Raises `UserError` for what is no JSON, is nested too deeply, or has so many values that parsing takes long.
    """
    if sum(map(content.count, (b",", b"[", b"{", b":", b":"))) > _MOST_VALUES:
        raise UserError(f"cannot read {where}: it has more than {_MOST_VALUES:,} values")
    try:
        return json.loads(content.decode("utf-8-sig"), parse_constant=_no_number, object_pairs_hook=pairs)
    except RecursionError:
        raise UserError(f"cannot read {where}: it is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"cannot read {where}: it is not valid JSON: {error}") from None


def read_json(path: str | Path, most: int) -> Any:
    """What a JSON file of at most `most` bytes holds. Raises `UserError` as `read_regular` and `parse_json`."""
    return parse_json(read_regular(path, most), path)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file atomically: nobody ever reads half of it. Raises `OSError`, and then leaves the old one."""
    scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        scratch.write_bytes(content.encode() if isinstance(content, str) else content)
        scratch.rename(path)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise


def expand_home(path: str | Path) -> Path:
    """The path with a `~` at its beginning replaced. Raises `UserError` where that is not known."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: there is no such home directory; set HOME, or name another directory") from None


def user_cache() -> Path:
    """$XDG_CACHE_HOME/dsv3_jax, or ~/.cache/dsv3_jax. Raises `UserError` where there is no home directory."""
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named) / "dsv3_jax"
    try:
        return Path.home() / ".cache" / "dsv3_jax"
    except RuntimeError:
        raise UserError("there is no home directory, which holds the cache: set XDG_CACHE_HOME to a directory") from None
