"""A Hugging Face checkpoint's directory: its tensors by name, checked against the model before any is read."""

import collections
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock

import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import UserError
from dsv3_jax.interop import fp8
from dsv3_jax.interop.hf_config import model_config, read_config_json
from dsv3_jax.interop.hf_tensors import Copy, Source, copies, sources
from dsv3_jax.interop.safetensors_file import DTYPES, Entry, MappedFile, read_header

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = ("F32", "BF16", "F16")  # numbers that float32 holds exactly
_OPEN_FILES = 2  # mapped at a time
_COMPARED = 1 << 24  # numbers of two tensors that are compared at a time


def read_index(path: Path) -> dict[str, str]:
    """{tensor: file name}. Raises `UserError` for what is no index, or names files outside of its directory."""
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        assert isinstance(files, dict)
    except (OSError, ValueError, KeyError, TypeError, AssertionError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error!r}") from None
    for name, file in files.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise UserError(f"{path}: tensor {name}: its file {str(file)[:80]!r} must be a plain file name")
    return files


@dataclass(frozen=True)
class _Located:
    file: str
    entry: Entry


class TensorFiles:
    """Tensors of a checkpoint directory by name: one safetensors file, or several with an index.

    Headers are read and checked at once, tensors when they are asked for; at most two files are mapped at a time.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        if (directory / INDEX).exists():
            listed = read_index(directory / INDEX)
        elif (directory / SINGLE).exists():
            listed = None
        else:
            raise UserError(f"{directory} has neither {SINGLE} nor {INDEX}")
        self._entries: dict[str, dict[str, Entry]] = {}
        self._at: dict[str, _Located] = {}
        self._mapped: collections.OrderedDict[str, MappedFile] = collections.OrderedDict()
        self._mapping = Lock()
        for file in [SINGLE] if listed is None else dict.fromkeys(listed.values()):
            if listed is not None and not (directory / file).is_file():
                first = next(name for name, its in listed.items() if its == file)
                raise UserError(f"{directory / file} is missing; the index has tensor {first} in it")
            self._entries[file] = read_header(directory / file)
            for name, entry in self._entries[file].items():
                if listed is not None and listed.get(name) != file:
                    raise UserError(f"{directory / file}: tensor {name} is in it, and not by {INDEX}")
                self._at[name] = _Located(file, entry)
        for name, file in (listed or {}).items():
            if name not in self._entries[file]:
                raise UserError(f"{directory / file}: tensor {name} is not in it, and should be by {INDEX}")

    def __contains__(self, name: str) -> bool:
        return name in self._at

    @property
    def names(self) -> set[str]:
        """All tensors."""
        return set(self._at)

    @property
    def files(self) -> list[str]:
        """Names of the files within the directory."""
        return list(self._entries)

    def entry(self, name: str) -> Entry:
        """A tensor's dtype, shape and bytes in its file."""
        return self._at[name].entry

    def dtype(self, name: str) -> np.dtype:
        """The smallest dtype that holds a weight's numbers exactly: its own, or float32 for one in 8 bits with scales."""
        dtype = DTYPES[self.entry(name).dtype]
        return np.dtype(np.float32) if dtype == fp8.VALUES else dtype

    def _map(self, name: str) -> MappedFile:
        file = self._at[name].file
        with self._mapping:
            if file not in self._mapped:
                self._mapped[file] = MappedFile(self.directory / file, self._entries[file])
                if len(self._mapped) > _OPEN_FILES:
                    self._mapped.popitem(last=False)  # goes when the last view of it does
            self._mapped.move_to_end(file)
            return self._mapped[file]

    def raw(self, name: str) -> np.ndarray:
        """A tensor as the file has it: a read-only view."""
        return self._map(name).view(name)

    def read(self, name: str) -> np.ndarray:
        """A weight in `dtype(name)`: a read-only view of the file, or its 8-bit values times their scales."""
        values = self.raw(name)
        return fp8.dequantize(values, self.raw(name + fp8.SUFFIX)) if values.dtype == fp8.VALUES else values

    def reader(self, name: str) -> Callable[[memoryview], int]:
        """A function that reads a tensor's bytes in order into the buffers it is given, and returns how many; 0 at the end."""
        return self._map(name).reader(name)

    def size(self, name: str) -> int:
        """A tensor's bytes in the file, without its scales."""
        entry = self.entry(name)
        return entry.end - entry.begin

    def release(self, name: str) -> None:
        """Let the pages of a tensor that has been read go from memory."""
        with self._mapping:
            mapped = self._mapped.get(self._at[name].file)
        if mapped:
            mapped.release(name)


@dataclass(frozen=True)
class HFCheckpoint:
    """A directory whose tensors are those of its config.json's model: names, shapes and dtypes are checked."""

    config: ModelConfig
    raw_config: dict
    files: TensorFiles
    sources: list[Source]
    copies: list[Copy]  # those that the directory has

    def is_fp8(self, name: str) -> bool:
        """Whether a tensor is in 8 bits, with scales."""
        return name + fp8.SUFFIX in self.files

    def check_copies(self) -> None:
        """Raises `UserError` for a copy of the embedding or head that differs: the model has one of each."""
        for copy in self.copies:
            ours, theirs = (self.files.raw(name).reshape(-1) for name in (copy.tensor, copy.of))
            same = ours.dtype == theirs.dtype
            for at in range(0, ours.size, _COMPARED):
                part = slice(at, at + _COMPARED)
                same = same and np.array_equal(ours[part].view(np.uint8), theirs[part].view(np.uint8))
            for name in (copy.tensor, copy.of):
                self.files.release(name)
            if not same:
                raise UserError(
                    f"{self.files.directory}: tensor {copy.tensor} differs from {copy.of}, which the model shares with it"
                )


def without_absent_mtp(config: ModelConfig, names: set[str]) -> ModelConfig:
    """The config of a checkpoint that has no tensor of its MTP modules, which transformers drops, has none of them."""
    prefix = f"model.layers.{config.num_hidden_layers}."
    return config if any(name.startswith(prefix) for name in names) else replace(config, num_nextn_predict_layers=0)


def open_hf(directory: str | Path) -> HFCheckpoint:
    """Open a checkpoint's directory, reading its headers only.

    Raises `UserError` naming a config field that is unknown or unsupported, a file that is damaged or cut off, or a tensor
    that is missing, unexpected, or of a wrong shape or dtype.
    """
    directory = Path(directory)
    raw_config = read_config_json(directory)
    config = model_config(raw_config, str(directory / "config.json"))
    files = TensorFiles(directory)
    config = without_absent_mtp(config, files.names)
    found = HFCheckpoint(config, raw_config, files, list(sources(config)), [c for c in copies(config) if c.tensor in files])
    _check(found)
    return found


def _check(found: HFCheckpoint) -> None:
    files, where = found.files, found.files.directory
    shapes = {s.tensor: s.shape for s in found.sources}
    missing = sorted(set(shapes) - files.names)
    if missing:
        raise UserError(f"{where}: tensor {missing[0]} is missing ({len(missing)} in all)")
    quantised = {name for name in shapes if DTYPES[files.entry(name).dtype] == fp8.VALUES}
    if quantised and not found.raw_config.get("quantization_config"):
        raise UserError(f"{where}: tensor {min(quantised)} is in 8 bits, and config.json has no quantization_config")
    shapes |= {c.tensor: c.shape for c in found.copies}
    scales = {name + fp8.SUFFIX: fp8.scale_shape(shapes[name]) for name in quantised}
    missing = sorted(set(scales) - files.names)
    if missing:
        raise UserError(f"{where}: tensor {missing[0]} is missing ({len(missing)} in all): a weight in 8 bits needs its scales")
    unexpected = sorted(files.names - set(shapes) - set(scales))
    if unexpected:
        raise UserError(f"{where}: tensor {unexpected[0]} is unexpected ({len(unexpected)} in all)")
    for name, shape in (shapes | scales).items():
        entry = files.entry(name)
        if entry.shape != shape:
            raise UserError(f"{where}: tensor {name} has shape {list(entry.shape)}; config.json implies {list(shape)}")
        allowed = ("F32",) if name in scales else ("F8_E4M3",) if name in quantised else _FLOATS
        if entry.dtype not in allowed:
            raise UserError(f"{where}: tensor {name} has dtype {entry.dtype}; use one of {', '.join(_FLOATS)} or block-FP8")
