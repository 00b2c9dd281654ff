"""A checkpoint's manifest: its format, and its files with their sizes and sha256; written last, verified before loading.

manifest.json is {"format": 1, "files": {name: [size, sha256]}}, and with `checkpoint.local_dir` also has {"local": {process:
sha256}}, of the indices of the copies on hosts (local.py). Format 0, which earlier versions wrote, is the files alone.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dsv3_jax.checkpoint.names import EMA, OPTIMIZER, WEIGHTS
from dsv3_jax.errors import UserError
from dsv3_jax.files import read_json, write_atomically

MANIFEST = "manifest.json"
FORMAT = 1  # of the checkpoints that this version writes; raise it when a version before could not read them
_ORBAX_FILES = ("_CHECKPOINT_METADATA", "orbax.checkpoint")
_POLL_S = 0.05
_PATIENCE_S = 300.0  # with other processes, which read as much
_LARGEST = 2**28  # bytes of a manifest; one of a million files has half of it
_LONGEST_NAME, _LONGEST_PATH = 255, 2048  # bytes of a file's name on Linux; characters of its path in a checkpoint
HASHING_THREADS = 4  # more than two cores can use, because some wait for the disk


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(directory: Path) -> list[Path]:
    return sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=1))


def _listing(directory: Path, files: Iterable[Path]) -> dict[str, list]:
    """[size in bytes, sha256] by name within `directory`."""
    files = list(files)
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        digests = pool.map(_digest, files)
        return {p.relative_to(directory).as_posix(): [p.stat().st_size, d] for p, d in zip(files, digests, strict=True)}


def write_manifest(directory: Path, known: Mapping[str, list] | None = None, local: Mapping[str, str] | None = None) -> None:
    """Write the manifest of all files in `directory`; those that are `known` ([size, sha256] by name) are not read again.

    `local`: the sha256 of the index of each process's copy on its host, by process.
    """
    known = dict(known or {})
    unknown = (p for p in _files(directory) if p.relative_to(directory).as_posix() not in known)
    content = {"format": FORMAT, "files": known | _listing(directory, unknown)}
    _write(directory / MANIFEST, content | ({"local": dict(local)} if local else {}))


def write_manifest_together(directory: Path, process: int, processes: int, local: str | None = None) -> None:
    """Write the manifest by all processes of a run, each of which reads its share; returns once the manifest is there.

    `local`: the sha256 of the index of this process's copy on its host, if it keeps one. The processes meet in the file system,
    because this goes on beside training, whose collectives must not be disturbed. Raises `UserError` if one of them does not
    come within `_PATIENCE_S`.
    """
    mine = {str(process): local} if local else {}
    if processes == 1:
        write_manifest(directory, local=mine)
        return
    _until(directory.is_dir, f"{directory} was not committed")  # which process 0 does
    parts = [directory.parent / f"{directory.name}.manifest-{i}-of-{processes}" for i in range(processes)]
    _write(parts[process], {"files": _listing(directory, _files(directory)[process::processes]), "local": mine})
    if process == 0:
        for i, part in enumerate(parts):
            _until(part.is_file, f"process {i} has not listed its files in {directory}")
        found = [json.loads(part.read_text()) for part in parts]
        known, copies = ({name: entry for part in found for name, entry in part[kind].items()} for kind in ("files", "local"))
        write_manifest(directory, known, copies)  # reads what another process's file system did not show it
        for part in parts:
            part.unlink()
    else:
        _until((directory / MANIFEST).is_file, f"process 0 has not written {directory / MANIFEST}")


def _until(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise UserError(f"{otherwise} within {_PATIENCE_S:.0f} s")
        time.sleep(_POLL_S)


def _format_of(manifest: Any) -> int:
    """Raises `ValueError` for what no version has written."""
    if not isinstance(manifest, dict):
        raise ValueError("not a JSON object")
    if "format" not in manifest:
        return 0
    number = manifest["format"]
    if type(number) is not int or number < 1:
        raise ValueError(f"format {str(number)[:40]!r} must be a whole number from 1 on")
    return number


def check_format(directory: Path) -> None:
    """Raise `UserError` if a checkpoint's format is newer than this version reads. `verify` says what else is wrong."""
    try:
        number = _format_of(read_json(directory / MANIFEST, _LARGEST))
    except (UserError, ValueError):
        return
    if number > FORMAT:
        raise UserError(
            f"checkpoint {directory} has format {number}, and this version of dsv3_jax reads formats up to {FORMAT}; load it "
            "with the version that wrote it, or a newer one"
        )


def _listed(name: str, entry: Any) -> tuple[int, str]:
    """A file's size and sha256. Raises `ValueError` for an entry that no version has written."""
    size, digest = entry
    parts = name.split("/")
    inside = "\0" not in name and all(0 < len(part.encode()) <= _LONGEST_NAME and part not in (".", "..") for part in parts)
    if len(name) > _LONGEST_PATH or not inside or type(size) is not int or not isinstance(digest, str):
        raise ValueError(f"the entry of {name[:80]!r} must be a file inside the checkpoint with its size and sha256")
    return size, digest


def is_as_listed(directory: Path, name: str) -> bool:
    """Whether one file of a checkpoint matches its manifest."""
    try:
        manifest = read_json(directory / MANIFEST, _LARGEST)
        size, digest = _listed(name, (manifest["files"] if _format_of(manifest) else manifest)[name])
        return (directory / name).stat().st_size == size and _digest(directory / name) == digest
    except (UserError, OSError, ValueError, KeyError, TypeError):
        return False


def local_digests(directory: Path) -> dict[str, str]:
    """The sha256 of the index of each process's copy on its host, by process; none if the manifest is damaged."""
    try:
        found = read_json(directory / MANIFEST, _LARGEST).get("local", {})
        return {process: digest for process, digest in found.items() if process.isdigit()}
    except (UserError, AttributeError):
        return {}


def content_digest(directory: Path) -> str:
    """A sha256 that verified checkpoints share if their files have the same names and contents."""
    manifest = read_json(directory / MANIFEST, _LARGEST)
    listing = manifest["files"] if _format_of(manifest) else manifest
    return hashlib.sha256(json.dumps(listing, sort_keys=True).encode()).hexdigest()


def _core_files(directory: Path) -> list[str]:
    """The files that loading reads: Orbax's own, and those in the sets of arrays (hidden ones are a file system's)."""
    found = [directory / name for name in _ORBAX_FILES]
    found += [path for group in (WEIGHTS, OPTIMIZER, EMA) for path in (directory / group).rglob("*")]
    return sorted(p.relative_to(directory).as_posix() for p in found if not p.name.startswith(".") and p.is_file())


def verify(directory: Path, process: int = 0, processes: int = 1, arrays: bool = True) -> None:
    """Raise `UserError` unless `directory` is a complete, undamaged checkpoint of a format that this version reads.

    Of several processes each reads its share of the contents, and finds what is wrong there. Without `arrays`, the files of
    array data (in Orbax's directories `d`) are left out, for a process that reads these arrays elsewhere.
    """
    check_format(directory)
    if not (directory / MANIFEST).exists():
        raise UserError(f"{directory} is not a checkpoint of dsv3_jax, or its saving was cut off (no {MANIFEST})")
    try:
        manifest = read_json(directory / MANIFEST, _LARGEST)
        listing = manifest["files"] if _format_of(manifest) else manifest
        expected = {name: _listed(name, entry) for name, entry in listing.items()}
    except (UserError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{directory}: damaged {MANIFEST}: {error}") from None
    if not expected:
        raise UserError(f"checkpoint {directory} is damaged: {MANIFEST} lists no files")
    if unlisted := next((name for name in _core_files(directory) if name not in expected), None):
        raise UserError(f"checkpoint {directory} is damaged: {MANIFEST} does not list {unlisted}")
    if not any(name.startswith(f"{WEIGHTS}/") for name in expected):
        raise UserError(f"checkpoint {directory} is damaged: {MANIFEST} lists no file of {WEIGHTS}/")
    names = [name for name in sorted(expected) if arrays or "d" not in name.split("/")]
    for name in names:
        size, path = expected[name][0], directory / name
        if not path.is_file() or path.stat().st_size != size:
            found = f"{path.stat().st_size} bytes" if path.is_file() else "nothing"
            raise UserError(f"checkpoint {directory} is damaged: {name} should have {size} bytes, found {found}")
    mine = names[process::processes]
    found = _listing(directory, (directory / name for name in mine))
    for name in mine:
        if found[name][1] != expected[name][1]:
            raise UserError(f"checkpoint {directory} is damaged: the contents of {name} do not match their sha256")
