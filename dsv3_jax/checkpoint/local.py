"""Copies of the state on the host that computed it, in memory (/dev/shm) or on its own disk: a start after a failure reads from
there what the host still has, and only the rest from shared storage.

A copy belongs to one checkpoint, by the digest of its manifest: it counts only if that checkpoint is complete. Each process
keeps the blocks of its devices, `STEP/PROCESS.blocks`, with their bounds and sha256 in `STEP/PROCESS.json`, written last.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from dsv3_jax.checkpoint.manifest import HASHING_THREADS
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


class LocalCopies:
    """One run's copies on this host: of the last checkpoint, and of the one before until the last one's are complete."""

    def __init__(self, directory: Path, run: Path):
        """`directory` is on this host; `run` is the run's directory of checkpoints, which names its copies in `directory`."""
        self._root = directory / hashlib.sha256(str(run).encode()).hexdigest()[:16]

    def write(self, step: int, process: int, taken: Snapshot, manifest: Path) -> None:
        """Write a process's blocks of the complete checkpoint with this `manifest`. Raises `OSError` where there is no room."""
        directory = self._root / str(step)
        index, data = directory / f"{process}.json", directory / f"{process}.blocks"
        directory.mkdir(parents=True, exist_ok=True)
        index.unlink(missing_ok=True)  # from an earlier save of the same step
        listing, offset = [], 0
        with open(data, "wb") as file:
            for (name, shape, bounds), block in taken.items():
                file.write(_bytes(block))
                listing.append([name, shape, bounds, block.dtype.name, offset, _sha256(block)])
                offset += block.nbytes
        write_atomically(index, json.dumps({"manifest": _digest(manifest), "blocks": listing}))
        for other in self._root.iterdir():
            if other.name.isdigit() and int(other.name) < step:
                shutil.rmtree(other, ignore_errors=True)

    def remove(self) -> None:
        """Delete all of the run's copies on this host."""
        shutil.rmtree(self._root, ignore_errors=True)

    def copy_of(self, step: int, manifest: Path) -> LocalCopy:
        """The copy of one checkpoint by all processes that were on this host, without what cannot be read."""
        blocks: dict[str, dict[Bounds, _Block]] = {}
        digest = _digest(manifest)
        for index in sorted((self._root / str(step)).glob("*.json")):
            for name, block in _read_index(index, digest):
                blocks.setdefault(name, {})[block.bounds] = block
        return LocalCopy({name: list(found.values()) for name, found in blocks.items()})


def _digest(manifest: Path) -> str:
    return hashlib.sha256(manifest.read_bytes()).hexdigest()


def _read_index(index: Path, manifest_digest: str) -> Iterable[tuple[str, _Block]]:
    try:
        found = json.loads(index.read_text())
        if found["manifest"] != manifest_digest:
            return []
        data = index.with_suffix(".blocks")
        return [
            (name, _Block(data, offset, tuple(shape), tuple((a, b) for a, b in bounds), np.dtype(dtype), sha256))
            for name, shape, bounds, dtype, offset, sha256 in found["blocks"]
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return []
