"""Checkpoints whose arrays are written or read a piece at a time, so that no array has to fit in memory.

What is written is an ordinary checkpoint (see manager.py): Orbax's tree of Zarr 3 arrays, every piece being a chunk in a file
of its own. A chunk's axes may lie in any order, so that the bytes of a transposed matrix can stay as they are.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, TextIO

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import tensorstore

from dsv3_jax.checkpoint.direct import ReadInto, write_past_cache
from dsv3_jax.checkpoint.manifest import write_manifest
from dsv3_jax.checkpoint.names import WEIGHTS
from dsv3_jax.checkpoint.scratch import claim, scratch_of
from dsv3_jax.cluster.processes import agree, on_first

_CACHE_BYTES = 256 * 2**20  # for decoded chunks: several small regions may be read from one


@dataclass(frozen=True)
class ChunkedArray:
    """How an array is stored: chunks of `chunk`'s shape, each with its axes in `order`, the slowest first."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]
    order: tuple[int, ...]

    def zarr_json(self) -> str:
        """The array's metadata file (Zarr 3 core specification)."""
        return json.dumps({
            "zarr_format": 3, "node_type": "array", "shape": self.shape, "data_type": self.dtype.name,
            "fill_value": 0 if self.dtype.kind in "iu" else 0.0,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": self.chunk}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "codecs": [
                {"name": "transpose", "configuration": {"order": self.order}},
                {"name": "bytes", "configuration": {"endian": "little"}},
            ],
            "attributes": {},
        })  # fmt: skip


class PiecewiseWriter:
    """Writes a checkpoint's weights chunk by chunk beside `target`, which exists only once it is complete.

    Continues where an earlier writer with the same `identity` was interrupted: `done` says which chunks are there already.
    Of several processes each writes chunks of its own; all of them call `commit`.
    """

    def __init__(self, target: Path, identity: str, arrays: Mapping[str, ChunkedArray], metadata: dict[str, Any]):
        self._target = target.absolute()  # Orbax takes no other
        self._scratch = scratch_of(target)
        self._checkpoint = self._scratch / "checkpoint"
        self._identity = identity
        _, fresh = agree(False, bool(on_first(self._must_begin)))
        if fresh:
            placeholders = {name: np.zeros(1, np.float32) for name in arrays}  # Orbax writes the tree, we the arrays
            context = ocp.Context()
            context.array.saving.use_ocdbt = False
            with context:
                ocp.save_checkpointables(str(self._checkpoint), {WEIGHTS: placeholders}, custom_metadata=metadata)
            on_first(lambda: self._begin(arrays))
        self._done = self._read_journals()
        self._journal = _open_journal(self._scratch / f"done-{jax.process_index()}.jsonl")
        self._writing = Lock()

    def _must_begin(self) -> bool:
        """Whether there is nothing to continue; takes the lock that keeps a second writer out."""
        self._claimed = claim(self._target)
        begun = self._scratch / "identity"
        if begun.is_file() and begun.read_text() == self._identity:
            return False
        self._claimed.clear()  # what an import of something else left
        return True

    def _begin(self, arrays: Mapping[str, ChunkedArray]) -> None:
        for name, array in arrays.items():
            directory = self._checkpoint / WEIGHTS / name
            shutil.rmtree(directory)
            directory.mkdir()
            (directory / "zarr.json").write_text(array.zarr_json())
        (self._scratch / "identity").write_text(self._identity)

    def _name(self, array: str, chunk: tuple[int, ...]) -> str:
        return "/".join((WEIGHTS, array, "c", *map(str, chunk)))

    def done(self, array: str, chunk: tuple[int, ...]) -> bool:
        """Whether the chunk is written, by this or an earlier writer."""
        return self._name(array, chunk) in self._done

    def write(self, array: str, chunk: tuple[int, ...], read: ReadInto) -> None:
        """Write the chunk at this index of the array's grid, from its numbers' bytes in `order`. Any thread may call it."""
        name = self._name(array, chunk)
        path = self._checkpoint / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self._record(name, *write_past_cache(path, read))

    def add_file(self, name: str, content: bytes) -> None:
        """Add a small file to the checkpoint, such as a tokenizer's."""
        path = self.path_of(name)
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(content)

    def path_of(self, name: str) -> Path:
        """Where to write a further file of the checkpoint."""
        return self._checkpoint / name

    def abandon(self) -> None:
        """Remove all that was written. For a single process."""
        self._journal.close()
        self._claimed.drop()

    def _record(self, name: str, size: int, digest: str) -> None:
        with self._writing:
            self._done[name] = [size, digest]
            self._journal.write(json.dumps([name, [size, digest]]) + "\n")

    def _read_journals(self) -> dict[str, list]:
        """[size, sha256] of the chunks that are there, by name; those whose line is damaged or cut off are written again."""
        found = dict(entry for path in sorted(self._scratch.glob("done-*.jsonl")) for entry in _entries(path))
        # a machine that lost power may have the line and not the file
        return {name: e for name, e in found.items() if _size(self._checkpoint / name) == e[0]}

    def commit(self) -> None:
        """Write the manifest, and make the checkpoint appear at its target."""
        self._journal.close()
        on_first(self._commit)

    def _commit(self) -> None:
        write_manifest(self._checkpoint, self._read_journals())
        self._claimed.publish(self._checkpoint)


def _open_journal(path: Path) -> TextIO:
    """Open a journal to append lines, after the last complete one."""
    path.touch()
    complete = path.read_bytes().rfind(b"\n") + 1
    os.truncate(path, complete)
    return path.open("a", buffering=1)


def _entries(path: Path) -> Iterator[tuple[str, list]]:
    """(name, [size, sha256]) of a journal's sound lines."""
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            name, (size, digest) = json.loads(line)
        except (ValueError, TypeError, RecursionError):
            continue
        if isinstance(name, str) and type(size) is int and isinstance(digest, str):
            yield name, [size, digest]


def _size(path: Path) -> int | None:
    with contextlib.suppress(OSError):  # of a name that no file has
        return path.stat().st_size if path.is_file() else None


class StoredArrays:
    """A checkpoint's weights by name, as TensorStore's arrays: an indexed region is read from disk, a chunk at a time."""

    def __init__(self, directory: Path):
        self._base = os.fspath(directory / WEIGHTS)
        self._in_database = (directory / WEIGHTS / "manifest.ocdbt").is_file()
        self._context = tensorstore.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})

    def __getitem__(self, name: str) -> tensorstore.TensorStore:
        kvstore = (
            {"driver": "ocdbt", "base": f"file://{self._base}/", "path": f"{name}/"}
            if self._in_database
            else {"driver": "file", "path": f"{self._base}/{name}/"}
        )
        return tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, open=True, context=self._context).result()
