"""One safetensors file: its header, checked before anything in it is believed, and its tensors as views of the mapped file.

The format (huggingface/safetensors): 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, then the
tensors' bytes without gaps. The library's reader copies tensors and does not name the one at which a file was cut off.
"""

import json
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dsv3_jax.checkpoint.direct import lazy_reader, write_past_cache
from dsv3_jax.errors import UserError
from dsv3_jax.files import open_regular, parse_json, refuse_pointer

_LARGEST_HEADER = 50_000_000  # bytes, of 300,000 tensors; the library allows twice that
_SHOWN = 200  # characters of a name
_BEGINNING = 64  # bytes that show what is no safetensors at all
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16), "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu), "I64": np.dtype(np.int64), "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16), "I8": np.dtype(np.int8), "U64": np.dtype(np.uint64), "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16), "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_),
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """A tensor in a file; its bytes are [begin, end), counted from the file's first byte."""

    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]
    begin: int
    end: int


def _is_size(n: Any) -> bool:
    return type(n) is int and n >= 0


def _bytes_of(dtype: str, shape: list[int], most: int) -> int:
    """A tensor's bytes; if more than `most`, any larger number, before the product of large sizes costs time."""
    size = 0 if 0 in shape else DTYPES[dtype].itemsize
    for n in shape:
        size *= n
        if size > most:
            break
    return size


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def _entry(path: Path, name: str, raw: Any, first: int, size: int) -> Entry:
    def bad(why: str) -> UserError:
        return UserError(f"{path}: tensor {name[:_SHOWN]}: {why}")

    if not isinstance(raw, dict) or set(raw) != {"dtype", "shape", "data_offsets"}:
        raise bad("its header entry must hold dtype, shape and data_offsets")
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise bad(f"dtype {str(dtype)[:40]!r} is unknown; use one of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(map(_is_size, shape)):
        raise bad("shape must be a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)) or offsets[0] > offsets[1]:
        raise bad("data_offsets must be [begin, end]")
    begin, end = offsets
    if first + end > size:
        raise bad(f"the file ends after {size} bytes, and it should reach to {first + end}: the file is cut off or damaged")
    if _bytes_of(dtype, shape, most=size) != end - begin:
        raise bad(f"{dtype} of that shape does not take the {end - begin} bytes of its data_offsets")
    return Entry(dtype, tuple(shape), first + begin, first + end)


def read_header(path: Path) -> dict[str, Entry]:
    """A file's tensors in the order of their bytes.

    Raises `UserError` naming the file, and the tensor where there is one, for anything that the format does not allow:
    nothing is allocated by what a header claims.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            refuse_pointer(path, file.read(_BEGINNING))
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise UserError(
                    f"{path}: a header of {length} bytes does not fit a file of {size}: no safetensors, or cut off in it"
                )
            if length > _LARGEST_HEADER:
                raise UserError(f"{path}: its header has {length:,} bytes; at most {_LARGEST_HEADER:,} are read")
            text = file.read(length)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from None
    where = f"the header of {path}"
    header = parse_json(text, where, _no_duplicates) if text.startswith(b"{") else None
    if not isinstance(header, dict):
        raise UserError(f"{path}: its header must be a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError(f"{path}: __metadata__ must map names to text")
    found = {name: _entry(path, name, raw, 8 + length, size) for name, raw in header.items()}
    found = dict(sorted(found.items(), key=lambda item: (item[1].begin, item[1].end)))
    at = 8 + length
    for name, entry in found.items():
        if entry.begin != at:
            raise UserError(f"{path}: tensor {name}: its bytes begin at {entry.begin}, and those before end at {at}")
        at = entry.end
    if at != size:
        raise UserError(f"{path}: {size - at} bytes follow the last tensor")
    return found


class MappedFile:
    """A file's tensors as read-only views of its mapped pages, which are given back tensor by tensor."""

    def __init__(self, path: Path, entries: Mapping[str, Entry]):
        self._entries = entries
        self._file = open_regular(path)
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)

    def reader(self, name: str) -> Callable[[memoryview], int]:
        """A function that reads a tensor's bytes in order into the buffers it is given, and returns how many; 0 at the end.

        For copying: no page is mapped.
        """
        _, _, at, end = self._entries[name]

        def read(buffer: memoryview) -> int:
            nonlocal at
            size = os.preadv(self._file.fileno(), [buffer[: end - at]], at) if at < end else 0
            if not size and at < end:
                raise UserError(f"{self._file.name}: tensor {name}: the file has become shorter while it was read")
            at += size
            return size

        return read

    def view(self, name: str) -> np.ndarray:
        """A tensor as a read-only array over the mapped pages."""
        dtype, shape, begin, _ = self._entries[name]
        return np.frombuffer(self._map, DTYPES[dtype], math.prod(shape), begin).reshape(shape)

    def release(self, name: str) -> None:
        """Let the tensor's pages go from this process's memory; a view that is still read fetches them again."""
        _, _, begin, end = self._entries[name]
        if hasattr(mmap, "MADV_DONTNEED"):
            page = begin // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, page, end - page)


def write_safetensors(
    path: Path, tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]], make: Callable[[str], np.ndarray]
) -> tuple[int, str]:
    """Write a file of tensors with these dtypes and shapes, each made when its turn comes; returns its size and sha256."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers wants to read that
    at = 0
    for name, (dtype, shape) in tensors.items():
        end = at + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of 8

    def parts() -> Iterator[np.ndarray]:
        yield np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8)
        for name, (dtype, shape) in tensors.items():
            tensor = make(name)
            assert (tensor.dtype, tensor.shape) == (dtype, shape), f"{name}: {tensor.dtype}{tensor.shape} for {dtype}{shape}"
            yield tensor

    return write_past_cache(path, lazy_reader(parts()))
