"""`dsv3 import --plan`: which tensor fills which array, what is left over on either side, its cost. Reads no weights."""

import collections
import math
import re
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import UserError
from dsv3_jax.interop import fp8
from dsv3_jax.interop.arrays import abstract_variables
from dsv3_jax.interop.hf_config import model_config, read_config_json
from dsv3_jax.interop.hf_files import INDEX, SINGLE, TensorFiles, read_index, without_absent_mtp
from dsv3_jax.interop.hf_import import THREADS
from dsv3_jax.interop.hf_tensors import copies, sources
from dsv3_jax.interop.safetensors_file import DTYPES
from dsv3_jax.progress import human


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


def _shown(index: tuple[int | slice, ...]) -> str:
    return ", ".join(":" if isinstance(i, slice) else str(i) for i in index)


def _implied_dtypes(config: ModelConfig, raw: dict) -> dict[str, str]:
    """Each tensor's dtype in a released checkpoint with this config.json."""
    plain = "F32" if (raw.get("dtype") or raw.get("torch_dtype")) == "float32" else "BF16"
    found = {c.tensor: plain for c in copies(config)}
    for s in sources(config):
        in_8_bits = raw.get("quantization_config") and s.is_fp8
        exact = s.tensor.endswith("e_score_correction_bias")
        found[s.tensor] = "F32" if exact else "F8_E4M3" if in_8_bits else plain
    return found


def plan_import(path: str | Path) -> ImportPlan:
    """The plan for a checkpoint's directory, or for its index alone with config.json beside it.

    Without the files, shapes and dtypes are those that config.json implies. Raises `UserError` for a config or a file that
    cannot be read.
    """
    path = Path(path)
    directory = path if path.is_dir() else path.parent
    raw = read_config_json(directory)
    config = model_config(raw, str(directory / "config.json"))
    index = path if path.is_file() else directory / INDEX
    files = None
    if index.is_file() and not all((directory / file).is_file() for file in set(read_index(index).values())):
        names = set(read_index(index))
    elif index.is_file() or (directory / SINGLE).is_file():
        files = TensorFiles(directory)
        names = files.names
    else:
        raise UserError(f"{directory} has neither {SINGLE} nor {INDEX}")
    config = without_absent_mtp(config, names)
    dtypes = _implied_dtypes(config, raw)
    if files is not None:
        dtypes |= {name: files.entry(name).dtype for name in dtypes if name in files}

    mapped, missing = [], {}
    exact = rounded = largest = 0
    for s in sources(config):
        if s.tensor not in names:
            missing.setdefault(s.array, s.tensor)
            continue
        mapped.append(Mapped(s.tensor, s.shape, dtypes[s.tensor], f"{s.array}[{_shown(s.full_index)}]"))
        size = math.prod(s.shape)
        if dtypes[s.tensor] == "F8_E4M3":
            scale = s.tensor + fp8.SUFFIX
            if scale in names:
                mapped.append(Mapped(scale, fp8.scale_shape(s.shape), "F32", f"scales of {s.tensor}"))
            else:
                missing.setdefault(s.array, scale)
        in_8_bits = dtypes[s.tensor] == "F8_E4M3"
        stored = size * (4 if in_8_bits else DTYPES[dtypes[s.tensor]].itemsize)
        exact += stored
        rounded += 2 * size if len(s.shape) > 1 else stored
        largest = max(largest, stored if in_8_bits or s.rope else 0)
    mapped += [Mapped(c.tensor, c.shape, dtypes[c.tensor], f"as {c.of}") for c in copies(config) if c.tensor in names]
    left = sorted(names - {m.tensor for m in mapped})
    arrays = {name: variable.get_value().shape for name, variable in abstract_variables(config).items()}
    return ImportPlan(mapped, left, missing, arrays, {"exact": exact, "bfloat16": rounded}, THREADS * largest)


def show_plan(plan: ImportPlan, console: Console) -> None:
    """A row for each kind of tensor, and the totals. Raises `UserError` at the end if something is left over."""
    kinds: dict[tuple[str, str], list[Mapped]] = collections.defaultdict(list)
    for m in plan.mapped:
        kinds[re.sub(r"\.\d+\b", ".N", m.tensor), re.sub(r"(?<=[\[/. ])\d+\b", "N", m.goes_to)].append(m)
    table = Table("tensor", "how many", "shape", "dtype", "bytes", "goes to", title="import")
    for (tensor, goes_to), found in kinds.items():
        size = sum(m.bytes for m in found)
        shape = " x ".join(map(str, found[0].shape))
        table.add_row(tensor, f"{len(found):,}", shape, found[0].dtype, human(size, "B"), goes_to)
    for column in table.columns:
        column.no_wrap = True
    console.print(table)
    filled = len(plan.arrays) - len(plan.arrays_left)
    console.print(f"tensors: {len(plan.mapped):,} of {len(plan.mapped) + len(plan.tensors_left):,} have a place")
    console.print(f"arrays:  {filled} of {len(plan.arrays)} are filled")
    written = ", ".join(f"{human(size, 'B')} with --dtype {dtype}" for dtype, size in plan.written_bytes.items())
    console.print(f"reads {human(sum(m.bytes for m in plan.mapped), 'B')}; writes {written}")
    console.print(f"memory for tensors, of each process that takes part: at most {human(plan.host_bytes, 'B')}")
    if plan.arrays_left:
        array, tensor = next(iter(plan.arrays_left.items()))
        raise UserError(f"{len(plan.arrays_left)} arrays are not filled: {array} misses tensor {tensor}")
    if plan.tensors_left:
        raise UserError(f"{len(plan.tensors_left)} tensors are left over, the first {plan.tensors_left[0]}")
