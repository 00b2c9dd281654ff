"""Copies of the state on the host that computed it, in memory (/dev/shm) or on its own disk: a start after a failure reads from
there what the host still has, and only the rest from shared storage.

Each process keeps the blocks of its devices, `STEP/PROCESS.blocks`, with their bounds and sha256 in `STEP/PROCESS.json`. The
sha256 of that index is in the shared checkpoint's manifest: a copy counts only if its checkpoint is complete, and nobody who
writes into a host's memory or disk decides what is restored. Copies are in a directory that its owner alone may enter.
"""

import errno
import hashlib
import json
import math
import os
import shutil
import stat
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from dsv3_jax.checkpoint.manifest import HASHING_THREADS, local_digests
from dsv3_jax.files import write_atomically

type Bounds = tuple[tuple[int, int], ...]  # a block's [start, stop) along each axis of its array


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> Bounds:
    return tuple((s.indices(n)[0], s.indices(n)[1]) for s, n in zip(index, shape, strict=True))


def _needed_bounds(template: jax.ShapeDtypeStruct) -> set[Bounds]:
    """The blocks of an array that this process's devices hold."""
    assert template.sharding is not None
    indices = template.sharding.addressable_devices_indices_map(template.shape).values()
    return {_bounds(index or (), template.shape) for index in indices}


@dataclass(frozen=True)
class _Block:
    """A block of an array in a file on this host."""

    file: Path
    offset: int
    array_shape: tuple[int, ...]
    bounds: Bounds
    dtype: np.dtype
    sha256: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.bounds)

    def read(self) -> np.ndarray:
        size = math.prod(self.shape) * self.dtype.itemsize
        return np.fromfile(self.file, np.uint8, size, offset=self.offset).view(self.dtype).reshape(self.shape)

    def is_intact(self) -> bool:
        try:
            return _sha256(self.read()) == self.sha256
        except (OSError, ValueError):  # gone, or cut off
            return False


def _bytes(block: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(block).reshape(-1).view(np.uint8)


def _sha256(block: np.ndarray) -> str:
    return hashlib.sha256(_bytes(block)).hexdigest()


def _overlap(a: Bounds, b: Bounds) -> Bounds:
    return tuple((max(x[0], y[0]), min(x[1], y[1])) for x, y in zip(a, b, strict=True))


def _size(bounds: Bounds) -> int:
    return math.prod(max(0, stop - start) for start, stop in bounds)


def _relative(bounds: Bounds, to: Bounds) -> tuple[slice, ...]:
    """The index of a block within another one that contains it."""
    return tuple(slice(start - origin, stop - origin) for (start, stop), (origin, _) in zip(bounds, to, strict=True))


class LocalCopy:
    """The blocks of one checkpoint's arrays that are on this host."""

    def __init__(self, blocks: Mapping[str, list[_Block]]):
        self._blocks = blocks

    def covered(self, templates: Mapping[str, jax.ShapeDtypeStruct]) -> set[str]:
        """Names of the arrays of which this host has, undamaged, all blocks that this process needs."""
        used = {name: self._used(name, template) for name, template in templates.items()}
        there = [(name, block) for name, blocks in used.items() for block in blocks or []]
        with ThreadPoolExecutor(HASHING_THREADS) as pool:
            intact = pool.map(_Block.is_intact, [block for _, block in there])
            damaged = {name for (name, _), good in zip(there, intact, strict=True) if not good}
        return {name for name, blocks in used.items() if blocks is not None} - damaged

    def _used(self, name: str, template: jax.ShapeDtypeStruct) -> list[_Block] | None:
        """The stored blocks that overlap what this process needs of an array; None if they do not cover it."""
        blocks = [b for b in self._blocks.get(name, []) if b.dtype == template.dtype and b.array_shape == template.shape]
        regions = _needed_bounds(template)
        if any(sum(_size(_overlap(b.bounds, region)) for b in blocks) != _size(region) for region in regions):
            return None
        return [b for b in blocks if any(_size(_overlap(b.bounds, region)) for region in regions)]

    def load(self, name: str, template: jax.ShapeDtypeStruct) -> jax.Array:
        """Put an array together that `covered` names."""

        def region(index: tuple[slice, ...] | None) -> np.ndarray:
            wanted = _bounds(index or (), template.shape)
            out = np.empty([stop - start for start, stop in wanted], template.dtype)
            for block in self._blocks[name]:
                shared = _overlap(block.bounds, wanted)
                if _size(shared):
                    out[_relative(shared, wanted)] = block.read()[_relative(shared, block.bounds)]
            return out

        assert template.sharding is not None
        return jax.make_array_from_callback(template.shape, template.sharding, region, template.dtype)


type Snapshot = dict[
    tuple[str, tuple[int, ...], Bounds], np.ndarray
]  # a process's blocks by array name, array shape and bounds


def snapshot(arrays: Mapping[str, jax.Array], buffers: Snapshot) -> Snapshot:
    """Copy this process's blocks out of its devices' memory; all copies are under way before the first is waited for.

    `buffers`, an earlier snapshot that nobody reads any more, is overwritten where it has the same blocks: fresh memory takes
    longer to get than to fill.
    """
    shards = [(name, array.shape, shard) for name, array in arrays.items() for shard in array.addressable_shards]
    for _, _, shard in shards:
        shard.data.copy_to_host_async()
    blocks: Snapshot = {}
    for name, shape, shard in shards:
        key = name, shape, _bounds(shard.index, shape)
        if key in blocks:
            continue
        blocks[key] = np.asarray(shard.data)
        if shard.device.platform == "cpu":  # it is the device's own memory, which training will reuse
            blocks[key] = _copied(blocks[key], buffers.get(key))
    return blocks


def _copied(block: np.ndarray, buffer: np.ndarray | None) -> np.ndarray:
    if buffer is None or (buffer.shape, buffer.dtype) != (block.shape, block.dtype):
        buffer = np.empty_like(block)
    np.copyto(buffer, block)
    return buffer


def index_of(taken: Snapshot) -> bytes:
    """The JSON index of a process's blocks in the order of its file: name, shape, bounds, dtype, offset, sha256 of each."""
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        digests = list(pool.map(_sha256, taken.values()))
    listing, offset = [], 0
    for ((name, shape, bounds), block), digest in zip(taken.items(), digests, strict=True):
        listing.append([name, shape, bounds, block.dtype.name, offset, digest])
        offset += block.nbytes
    return json.dumps(listing).encode()


def _check_private(directory: Path) -> None:
    """Raise `OSError` unless a directory is this user's own, or one of the system's in which nobody can replace it."""
    found = directory.lstat()
    others_write = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX
    if not stat.S_ISDIR(found.st_mode) or found.st_uid not in (os.geteuid(), 0) or others_write:
        raise PermissionError(
            errno.EPERM, f"it must be a directory of user {os.geteuid()} that others cannot write", str(directory)
        )


class LocalCopies:
    """One run's copies on this host: of the last checkpoint, and of the one before until the last one's are complete."""

    def __init__(self, directory: Path, run: Path):
        """`directory` is on this host; `run` is the run's directory of checkpoints, which names its copies in `directory`."""
        self._directory = directory
        self._root = directory / hashlib.sha256(str(run).encode()).hexdigest()[:16]

    def _check_own(self) -> None:
        """Raise `OSError` unless the copies' directory is this user's alone, and stays where it is."""
        _check_private(self._directory.resolve())
        _check_private(self._root)
        if self._root.stat().st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, f"it belongs to user {self._root.stat().st_uid}", str(self._root))
        self._root.chmod(0o700)  # earlier versions let others look in

    def write(self, step: int, process: int, taken: Snapshot, index: bytes) -> None:
        """Write a process's blocks of a complete checkpoint, with their index. Raises `OSError` where it cannot."""
        for made in (self._directory, self._root):
            made.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._check_own()
        directory = self._root / str(step)
        file, data = directory / f"{process}.json", directory / f"{process}.blocks"
        directory.mkdir(exist_ok=True)
        file.unlink(missing_ok=True)  # from an earlier save of the same step
        with open(data, "wb") as out:
            for block in taken.values():
                out.write(_bytes(block))
        write_atomically(file, index)
        for other in self._root.iterdir():
            if other.name.isdigit() and int(other.name) < step:
                shutil.rmtree(other, ignore_errors=True)

    def remove(self) -> None:
        """Delete all of the run's copies on this host."""
        shutil.rmtree(self._root, ignore_errors=True)

    def copy_of(self, checkpoint: Path) -> LocalCopy:
        """The copy of the checkpoint in this directory by all processes that were on this host, without what cannot be read."""
        blocks: dict[str, dict[Bounds, _Block]] = {}
        try:
            self._check_own()
        except OSError:  # there are no copies, or somebody else's
            return LocalCopy({})
        for process, digest in local_digests(checkpoint).items():
            for name, block in _read_index(self._root / checkpoint.name / f"{process}.json", digest):
                blocks.setdefault(name, {})[block.bounds] = block
        return LocalCopy({name: list(found.values()) for name, found in blocks.items()})


def _read_index(index: Path, digest: str) -> Iterable[tuple[str, _Block]]:
    try:
        content = index.read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            return []
        data = index.with_suffix(".blocks")
        return [
            (name, _Block(data, offset, tuple(shape), tuple((a, b) for a, b in bounds), np.dtype(dtype), sha256))
            for name, shape, bounds, dtype, offset, sha256 in json.loads(content)
        ]
    except (OSError, ValueError, TypeError):
        return []
