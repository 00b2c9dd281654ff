"""What a checkpoint's files must be: a list of their sizes and sha256, written last and verified before loading."""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dsv3_jax.errors import UserError

MANIFEST = "manifest.json"
_HASHING_THREADS = 4  # more than two cores can use, because some wait for the disk


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(directory: Path) -> list[Path]:
    return sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST)


def write_manifest(directory: Path, known: Mapping[str, list] | None = None) -> None:
    """Every file's [size, sha256] by its name within `directory`; those that are `known` are not read again."""
    names = {p.relative_to(directory).as_posix(): p for p in _files(directory)}
    listing = dict(known or {}) | {n: [p.stat().st_size, _digest(p)] for n, p in names.items() if n not in (known or {})}
    scratch = directory / f"{MANIFEST}.tmp"
    scratch.write_text(json.dumps(listing, indent=1))
    scratch.rename(directory / MANIFEST)


def verify(directory: Path) -> None:
    """Raise `UserError` unless `directory` is a whole checkpoint of this project."""
    try:
        listing = json.loads((directory / MANIFEST).read_text())
        expected = {name: (size, digest) for name, (size, digest) in listing.items()}
    except FileNotFoundError:
        raise UserError(f"{directory} is not a checkpoint of dsv3_jax, or its saving was cut off (no {MANIFEST})") from None
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{directory}: damaged {MANIFEST}: {error}") from None
    for name, (size, _) in expected.items():
        path = directory / name
        if not path.is_file() or path.stat().st_size != size:
            found = f"{path.stat().st_size} bytes" if path.is_file() else "nothing"
            raise UserError(f"checkpoint {directory} is damaged: {name} should have {size} bytes, found {found}")
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        found = dict(zip(expected, pool.map(lambda name: _digest(directory / name), expected), strict=True))
    for name, (_, digest) in expected.items():
        if found[name] != digest:
            raise UserError(f"checkpoint {directory} is damaged: the contents of {name} do not match their sha256")
