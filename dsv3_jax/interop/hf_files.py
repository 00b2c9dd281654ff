"""A Hugging Face checkpoint's directory: its tensors by name, checked against the model before any is read."""

import collections
import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from dsv3_jax.cluster.processes import is_first
from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import UserError
from dsv3_jax.interop import fp8
from dsv3_jax.interop.hf_config import ignored_fields, model_config, read_config_json
from dsv3_jax.interop.hf_directory import INDEX, SINGLE, not_a_checkpoint, read_object
from dsv3_jax.interop.hf_tensors import Copy, Source, copies, sources
from dsv3_jax.interop.numbers import check_exact, check_numbers, check_scales
from dsv3_jax.interop.safetensors_file import DTYPES, Entry, MappedFile, read_header

_FLOATS = ("F32", "BF16", "F16", "F64")  # F64 where every number is one of float32's
_SCALES = ("F32", "F8_E8M0")
# Tensors that modelling code computes from config.json, and that some versions of it have saved.
_COMPUTED = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
_OPEN_FILES = 2  # mapped at a time
_COMPARED = 1 << 24  # numbers of two tensors that are compared at a time
_MISSING = 1000  # tensors that are counted, if so many are missing


def read_index(path: Path) -> dict[str, str]:
    """{tensor: file name}. Raises `UserError` for what is no index, or names files outside of its directory."""
    files = read_object(path).get("weight_map")
    if not isinstance(files, dict):
        raise UserError(f"cannot read {path}: its weight_map must be an object, {{tensor: file name}}")
    for name, file in files.items():
        if not isinstance(file, str) or "/" in file or file in ("", ".", ".."):
            raise UserError(f"{path}: tensor {name[:80]}: its file {str(file)[:80]!r} must be a plain file name")
    return files


def listed_tensors(directory: Path) -> dict[str, str] | None:
    """{tensor: file name} by the index; None for a single file. Raises `UserError` if there is neither."""
    if (directory / INDEX).exists():
        return read_index(directory / INDEX)
    if (directory / SINGLE).exists():
        return None
    raise not_a_checkpoint(directory, f"neither {SINGLE} nor {INDEX}")


def missing_files(directory: Path, listed: Mapping[str, str]) -> str | None:
    """What to say of an index of which some files are not there; None if all are."""
    files = dict.fromkeys(listed.values())
    missing = [file for file in files if not os.path.exists(directory / file)]  # Path's raises for long names
    if not missing:
        return None
    tensor = next(name for name, file in listed.items() if file == missing[0])
    return (
        f"{directory} has {len(files) - len(missing)} of the {len(files)} files of {INDEX}: {missing[0][:80]} is missing, with "
        f"tensor {tensor[:80]}"
    )


def read_headers(directory: Path, listed: Mapping[str, str] | None) -> dict[str, dict[str, Entry]]:
    """{file: its tensors} of those files that are there. Raises `UserError` for a damaged one, or one not as the index says."""
    found: dict[str, dict[str, Entry]] = {}
    for file in [SINGLE] if listed is None else dict.fromkeys(listed.values()):
        if not os.path.exists(directory / file):
            continue
        found[file] = read_header(directory / file)
        for name in found[file]:
            if listed is not None and listed.get(name) != file:
                raise UserError(f"{directory / file}: tensor {name} is in it, and not by {INDEX}")
    for name, file in (listed or {}).items():
        if name not in found.get(file, (name,)):
            raise UserError(f"{directory / file}: tensor {name} is not in it, and should be by {INDEX}")
    return found


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
        listed = listed_tensors(directory)
        if missing := missing_files(directory, listed or {}):
            raise UserError(missing)
        self._entries = read_headers(directory, listed)
        self._at = {name: _Located(file, entry) for file, held in self._entries.items() for name, entry in held.items()}
        self._mapped: collections.OrderedDict[str, MappedFile] = collections.OrderedDict()
        self._mapping = Lock()

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
        """The smallest dtype that holds a weight's numbers exactly: its own; float32 for 8 bits with scales or float64."""
        dtype = DTYPES[self.entry(name).dtype]
        return np.dtype(np.float32) if dtype in (fp8.VALUES, np.float64) else dtype

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
        """A weight in `dtype(name)`: a read-only view of the file, its 8-bit values times their scales, or its rounded float64.

        Raises `UserError` where 8-bit values, scales or float64 are no numbers that float32 holds.
        """
        values, where = self.raw(name), str(self.directory)
        if values.dtype == np.float64:
            return check_exact(values, where, name)
        if values.dtype != fp8.VALUES:
            return values
        scales = self.raw(name + fp8.SUFFIX).astype(np.float32)
        check_scales(scales, where, name + fp8.SUFFIX)
        check_numbers(values, where, name)
        return fp8.dequantize(values, scales)

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
    notes: list[str]  # a line for everything that is left out

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


@dataclass(frozen=True)
class Fitted:
    """The model that a checkpoint's tensors hold, and which of them belong to it."""

    config: ModelConfig
    names: set[str]
    notes: list[str]  # a line for each kind of tensor that is left out


def fit(config: ModelConfig, names: Collection[str]) -> Fitted:
    """Leave out tensors that are computed, and MTP modules that either config.json or the tensors do not have.

    transformers drops the modules' tensors and keeps the number of them in config.json.
    """
    kept, notes, first = set(names), [], config.num_hidden_layers
    computed = {name for name in kept if name.endswith(_COMPUTED)}
    if computed:
        notes.append(f"{len(computed)} tensors are left out, which follow from config.json: {min(computed)} ...")
    kept -= computed
    if not any(name.startswith(f"model.layers.{first}.") for name in kept):
        config = replace(config, num_nextn_predict_layers=0)
    elif config.num_nextn_predict_layers == 0:
        modules = 0
        for layer in count(first):
            prefix = f"model.layers.{layer}."
            if prefix + "eh_proj.weight" not in kept:  # a layer that is no such module is unexpected
                break
            kept = {name for name in kept if not name.startswith(prefix)}
            modules += 1
        if modules:
            notes.append(
                f"{len(names) - len(computed) - len(kept)} tensors of {modules} multi-token-prediction modules are left out: "
                "config.json has num_nextn_predict_layers=0"
            )
    return Fitted(config, kept, notes)


def wanted(config: ModelConfig, names: Collection[str], where: Path) -> list[Source]:
    """All tensors of the model, of which those that are not among `names` are missing.

    Raises `UserError` if more than a thousand are: a config.json may claim any number of layers and experts.
    """
    most = len(names) + _MISSING
    found = list(islice(sources(config), most))
    if len(found) == most:
        first = next(s.tensor for s in found if s.tensor not in names)
        raise UserError(
            f"{where}: tensor {first} is missing, and with it more than {_MISSING} of those that config.json implies"
        )
    return found


def open_hf(directory: str | Path) -> HFCheckpoint:
    """Open a checkpoint's directory, reading its headers only.

    Raises `UserError` naming a config field that is unknown or unsupported, a file that is damaged or cut off, or a tensor
    that is missing, unexpected, or of a wrong shape or dtype.
    """
    directory = Path(directory)
    raw_config = read_config_json(directory)
    config = model_config(raw_config, str(directory / "config.json"))
    files = TensorFiles(directory)
    fitted = fit(config, files.names)
    found = wanted(fitted.config, fitted.names, directory)
    shared = [c for c in copies(fitted.config) if c.tensor in files]
    entries = {name: files.entry(name) for name in fitted.names}
    check_8_bits(directory, found, entries, raw_config)
    _check_names(directory, found, shared, entries)
    check_entries(directory, found, shared, entries)
    return HFCheckpoint(fitted.config, raw_config, files, found, shared, [*about_fields(raw_config), *fitted.notes])


def about_fields(raw_config: dict[str, Any]) -> list[str]:
    """A line about the fields of config.json that are ignored, if there are any."""
    ignored = ignored_fields(raw_config)
    return [f"config.json: ignored {', '.join(ignored)}, which say nothing about the numbers"] if ignored else []


def _in_8_bits(found: Iterable[Source], entries: Mapping[str, Entry]) -> dict[str, tuple[int, ...]]:
    """Shapes of the scales of 8-bit weights, by the scales' names."""
    return {
        s.tensor + fp8.SUFFIX: fp8.scale_shape(s.shape)
        for s in found
        if s.tensor in entries and entries[s.tensor].dtype == "F8_E4M3" and len(s.shape) == 2
    }


def _check_names(where: Path, found: list[Source], shared: list[Copy], entries: Mapping[str, Entry]) -> None:
    weights = {s.tensor for s in found}
    missing = sorted(weights - entries.keys())
    if missing:
        raise UserError(f"{where}: tensor {missing[0]} is missing ({len(missing)} in all)")
    scales = _in_8_bits(found, entries).keys()
    missing = sorted(scales - entries.keys())
    if missing:
        raise UserError(f"{where}: tensor {missing[0]} is missing ({len(missing)} in all): a weight in 8 bits needs its scales")
    unexpected = sorted(entries.keys() - weights - scales - {c.tensor for c in shared})
    if unexpected:
        raise UserError(f"{where}: tensor {unexpected[0][:200]} is unexpected ({len(unexpected)} in all)")


def check_8_bits(where: Path, found: list[Source], entries: Mapping[str, Entry], raw_config: Mapping[str, Any]) -> None:
    """Raise `UserError` for a weight in 8 bits of which config.json knows nothing: its blocks could be any."""
    scales = _in_8_bits(found, entries)
    if scales and not raw_config.get("quantization_config"):
        name = min(scales).removesuffix(fp8.SUFFIX)
        raise UserError(f"{where}: tensor {name} is in 8 bits, and config.json has no quantization_config")


def check_entries(where: Path, found: list[Source], shared: list[Copy], entries: Mapping[str, Entry]) -> None:
    """Raise `UserError` for a wrong shape or dtype of a tensor that is there."""
    scales = _in_8_bits(found, entries)
    shapes = {s.tensor: s.shape for s in found} | {c.tensor: c.shape for c in shared} | scales
    for name, shape in ((name, shape) for name, shape in shapes.items() if name in entries):
        entry = entries[name]
        if entry.shape != shape:
            raise UserError(f"{where}: tensor {name} has shape {list(entry.shape)}; config.json implies {list(shape)}")
        allowed = _SCALES if name in scales else ("F8_E4M3",) if name + fp8.SUFFIX in scales else _FLOATS
        if entry.dtype not in allowed:
            others = " or block-FP8" if allowed == _FLOATS else ""
            raise UserError(f"{where}: tensor {name} has dtype {entry.dtype}; use one of {', '.join(allowed)}{others}")
    for copy in shared:
        ours, theirs = (entries[name].dtype if name in entries else None for name in (copy.tensor, copy.of))
        if ours != theirs and None not in (ours, theirs):
            raise UserError(f"{where}: tensor {copy.tensor} has dtype {ours}, and {copy.of}, which it repeats, {theirs}")


def say(found: HFCheckpoint) -> None:
    """Print the checkpoint's notes to standard error, once for all processes."""
    for note in found.notes if is_first() else []:
        print(f"{found.files.directory}: {note}", file=sys.stderr, flush=True)
