"""`dsv3 import --plan`: which tensor fills which array, what is left over on either side, its cost. Reads no weights."""

import collections
import math
import re
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from dsv3_jax.errors import UserError
from dsv3_jax.interop import fp8
from dsv3_jax.interop.arrays import abstract_variables
from dsv3_jax.interop.hf_config import model_config, read_config_json
from dsv3_jax.interop.hf_files import (
    about_fields,
    check_8_bits,
    check_entries,
    fit,
    listed_tensors,
    missing_files,
    read_headers,
    read_index,
    wanted,
)
from dsv3_jax.interop.hf_formats import usual_dtype
from dsv3_jax.interop.hf_import import THREADS, files_to_keep
from dsv3_jax.interop.hf_tensors import Copy, Source, copies
from dsv3_jax.interop.safetensors_file import DTYPES
from dsv3_jax.progress import human

_ANY_WIDTH = 10_000  # columns


@dataclass(frozen=True)
class Mapped:
    """A tensor, its shape and dtype by the file's header or config.json, and what it fills."""

    tensor: str
    shape: tuple[int, ...]
    dtype: str  # in safetensors' names
    goes_to: str  # an array with the index that it fills, the weight that it scales, or the tensor that it repeats

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class ImportPlan:
    """What an import would do; see `plan_import` and `show_plan`."""

    mapped: list[Mapped]
    tensors_left: list[str]  # tensors that fill nothing
    arrays_left: dict[str, str]  # array -> a tensor that is missing for it
    arrays: dict[str, tuple[int, ...]]
    written_bytes: dict[str, int]  # by --dtype of `dsv3 import`: the bytes of weights that it writes
    host_bytes: int  # memory of a process, at most, for tensors that are converted; others go through a small buffer
    notes: list[str]  # what is ignored or left out, and where shapes and dtypes are from
    files_missing: str | None  # what to say of an index of which some files are not there


def _shown(index: tuple[int | slice, ...]) -> str:
    return ", ".join(":" if isinstance(i, slice) else str(i) for i in index)


def _implied_dtypes(found: list[Source], shared: list[Copy], raw: dict) -> dict[str, str]:
    """Each tensor's dtype in a released checkpoint with this config.json."""
    plain = "hf-f32" if (raw.get("dtype") or raw.get("torch_dtype")) == "float32" else "hf-bf16"
    format = "hf-fp8" if raw.get("quantization_config") else plain
    dtypes = {s.tensor: usual_dtype(s, format) for s in found}
    return dtypes | {c.tensor: dtypes[c.of] for c in shared}


def plan_import(path: str | Path) -> ImportPlan:
    """The plan for a checkpoint's directory, or for its index alone with config.json beside it.

    Without the files, shapes and dtypes are those that config.json implies. Raises `UserError` for a config or a file that
    cannot be read, or a tensor whose shape or dtype cannot be imported.
    """
    path = Path(path)
    directory = path.parent if path.is_file() else path
    raw = read_config_json(directory)
    config = model_config(raw, str(directory / "config.json"))
    listed = read_index(path) if path.is_file() else listed_tensors(directory)
    headers = read_headers(directory, listed)
    entries = {name: entry for held in headers.values() for name, entry in held.items()}
    fitted = fit(config, entries if listed is None else listed)
    names, notes, absent = fitted.names, [*about_fields(raw), *fitted.notes], None
    if not headers:
        notes.append("no file with weights is here: shapes and dtypes are those that config.json implies")
    elif listed is not None:
        absent = missing_files(directory, listed)
    found = wanted(fitted.config, names, directory)
    shared = [c for c in copies(fitted.config) if c.tensor in names]
    check_8_bits(directory, found, entries, raw)
    check_entries(directory, found, shared, entries)
    files_to_keep(directory)
    dtypes = _implied_dtypes(found, shared, raw)
    dtypes |= {name: entries[name].dtype for name in dtypes if name in entries}

    mapped, missing = [], {}
    exact = rounded = largest = 0
    for s in found:
        if s.tensor not in names:
            missing.setdefault(s.array, s.tensor)
            continue
        mapped.append(Mapped(s.tensor, s.shape, dtypes[s.tensor], f"{s.array}[{_shown(s.full_index)}]"))
        size, in_8_bits = math.prod(s.shape), dtypes[s.tensor] == "F8_E4M3"
        if in_8_bits:
            scale = s.tensor + fp8.SUFFIX
            if scale in names:
                dtype = entries[scale].dtype if scale in entries else "F32"
                mapped.append(Mapped(scale, fp8.scale_shape(s.shape), dtype, f"scales of {s.tensor}"))
            else:
                missing.setdefault(s.array, scale)
        stored = size * min(4, 4 if in_8_bits else DTYPES[dtypes[s.tensor]].itemsize)
        exact += stored
        rounded += 2 * size if len(s.shape) > 1 else stored
        largest = max(largest, stored if in_8_bits or s.rope else 0)
    mapped += [Mapped(c.tensor, c.shape, dtypes[c.tensor], f"as {c.of}") for c in shared]
    left = sorted(names - {m.tensor for m in mapped})
    arrays = {name: variable.get_value().shape for name, variable in abstract_variables(fitted.config).items()}
    written = {"exact": exact, "bfloat16": rounded}
    return ImportPlan(mapped, left, missing, arrays, written, THREADS * largest, notes, absent)


def _show_mapped(kinds: dict[tuple[str, str], list[Mapped]], console: Console) -> None:
    """A table, or where its rows do not fit a line each, two lines for a row."""
    table = Table("tensor", "how many", "shape", "dtype", "bytes", "goes to", title="import")
    for (tensor, goes_to), found in kinds.items():
        size = human(sum(m.bytes for m in found), "B")
        table.add_row(tensor, f"{len(found):,}", " x ".join(map(str, found[0].shape)), found[0].dtype, size, goes_to)
    if Measurement.get(console, console.options.update(width=_ANY_WIDTH), table).maximum <= console.width:
        console.print(table)
        return
    for tensor, count, shape, dtype, size, goes_to in zip(*(column.cells for column in table.columns), strict=True):
        console.print(f"{tensor}\n    {count} of {shape} in {dtype}, {size}, to {goes_to}", soft_wrap=True)


def show_plan(plan: ImportPlan, console: Console) -> None:
    """A row for each kind of tensor, and the totals. Raises `UserError` at the end if something is left over or missing."""
    kinds: dict[tuple[str, str], list[Mapped]] = collections.defaultdict(list)
    for m in plan.mapped:
        kinds[re.sub(r"\.\d+\b", ".N", m.tensor), re.sub(r"(?<=[\[/. ])\d+\b", "N", m.goes_to)].append(m)
    _show_mapped(kinds, console)
    filled = len(plan.arrays) - len(plan.arrays_left)
    console.print(f"tensors: {len(plan.mapped):,} of {len(plan.mapped) + len(plan.tensors_left):,} have a place")
    console.print(f"arrays:  {filled} of {len(plan.arrays)} are filled")
    written = ", ".join(f"{human(size, 'B')} with --dtype {dtype}" for dtype, size in plan.written_bytes.items())
    console.print(f"reads {human(sum(m.bytes for m in plan.mapped), 'B')}; writes {written}")
    console.print(f"memory for tensors, of each process that takes part: at most {human(plan.host_bytes, 'B')}")
    for note in plan.notes:
        console.print(note, markup=False)
    if plan.files_missing:
        raise UserError(plan.files_missing)
    if plan.arrays_left:
        array, tensor = next(iter(plan.arrays_left.items()))
        raise UserError(f"{len(plan.arrays_left)} arrays are not filled: {array} misses tensor {tensor}")
    if plan.tensors_left:
        raise UserError(f"{len(plan.tensors_left)} tensors are left over, the first {plan.tensors_left[0]}")
