"""`dsv3 import`: a Hugging Face checkpoint becomes one of this project's, tensor by tensor.

Every tensor is a chunk of the array that it fills, in the order of its own bytes: what is in 16 or 32 bits is copied, not
transposed, and nothing is rounded; weights in 8 bits are multiplied by their scales, into float32. Memory holds a few tensors.
"""

import contextlib
import copy
import hashlib
import json
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsv3_jax.checkpoint.direct import ReadInto, array_reader
from dsv3_jax.checkpoint.names import weight_name
from dsv3_jax.checkpoint.piecewise import ChunkedArray, PiecewiseWriter
from dsv3_jax.checkpoint.scratch import resolved, scratch_of
from dsv3_jax.checkpoint.storage import check_path
from dsv3_jax.cluster.processes import is_first, on_first
from dsv3_jax.config import Config, config_from_dict, config_to_dict, config_to_yaml
from dsv3_jax.config_input import merge_overrides
from dsv3_jax.data.companions import DIRECTORY, TOKENIZER, read_companion, read_companions
from dsv3_jax.data.special_tokens import check_stated
from dsv3_jax.errors import UserError
from dsv3_jax.interop import fp8
from dsv3_jax.interop.arrays import abstract_variables
from dsv3_jax.interop.hf_files import HFCheckpoint, open_hf, say
from dsv3_jax.interop.hf_formats import describe_layout
from dsv3_jax.interop.hf_tensors import Source
from dsv3_jax.interop.numbers import check_numbers, checked
from dsv3_jax.interop.safetensors_file import DTYPES, write_safetensors
from dsv3_jax.progress import BytesProgress
from dsv3_jax.runs.directory import with_absolute_paths

# in a checkpoint: the scales of the 8-bit weights that were imported, and the values where weights do not say what they were
SCALES = "scales.safetensors"
THREADS = 4  # each reads, hashes and writes; more than cores, because some wait for the disk
_IN_FLIGHT = 2 * THREADS  # tensors
_SEQ_LEN = 4096  # data.seq_len of an imported config, where the context is as long
# What differs from a run from scratch: a model that has learnt is tuned with small steps (report, section 5.1: 5e-6 to 1e-6),
# with the weight of MTP and without the changes of the router's bias with which its training ended (section 4.2).
_FINE_TUNING: dict[str, dict[str, float]] = {
    "optim": {"lr": 1e-5, "lr_final": 1e-6},
    "train": {"mtp_loss_weight": 0.1, "mtp_loss_weight_final": 0.1, "bias_update_speed": 0.0},
}


def imported_config(found: HFCheckpoint, name: str, overrides: tuple[str, ...]) -> Config:
    """The model as config.json has it, a schedule for fine-tuning, and the rest by default.

    `overrides` may set all but keys of the model; `name` is that of a directory, which may be none of a run.
    """
    name = re.sub(r"^[^A-Za-z0-9]+|[^A-Za-z0-9._-]+", "-", name).strip("-") or "imported"
    context = found.config.max_position_embeddings
    raw: dict[str, Any] = {"name": name, "data": {"seq_len": min(context, _SEQ_LEN)}, **copy.deepcopy(_FINE_TUNING)}
    merge_overrides(raw, overrides, Config)
    if "model" in raw:
        raise UserError("model.* comes from config.json and cannot be overridden")
    raw["model"] = config_to_dict(found.config)
    return with_absolute_paths(config_from_dict(raw, "import"))


def stored_arrays(found: HFCheckpoint, bfloat16: bool) -> dict[str, ChunkedArray]:
    """How the imported checkpoint stores the model's arrays, by their names in `hf_tensors`.

    The dtype is the smallest that holds all of an array's tensors exactly, or bfloat16 for matrices if asked for.
    """
    variables, arrays = abstract_variables(found.config), {}
    for s in found.sources:
        dtype = found.files.dtype(s.tensor)
        if bfloat16 and len(s.shape) > 1:
            dtype = DTYPES["BF16"]
        if s.array in arrays and arrays[s.array].dtype != dtype:
            dtype = np.dtype(np.float32)  # 16-bit formats of two kinds, or some tensors in more than 16
        arrays[s.array] = ChunkedArray(variables[s.array].get_value().shape, dtype, s.chunk, s.chunk_order)
    return arrays


def _identity(found: HFCheckpoint, options: dict[str, Any]) -> str:
    """A digest of what an import reads (files' headers, sizes and times) and its options: equal ones can be continued."""
    files = [(f, (found.files.directory / f).stat()) for f in sorted(found.files.files)]
    described = {
        "files": [(f, stat.st_size, stat.st_mtime_ns) for f, stat in files],
        "tensors": [(name, found.files.entry(name)) for name in sorted(found.files.names)],
        "config": found.raw_config,
        "options": options,
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _chunk_index(s: Source) -> tuple[int, ...]:
    return tuple(0 if isinstance(i, slice) else i for i in s.full_index)


def import_hf(directory: str | Path, checkpoint: str | Path, overrides: tuple[str, ...] = (), bfloat16: bool = False) -> Path:
    """Convert a Hugging Face checkpoint to one of this project's, a few tensors at a time.

    `load`, `evaluate` and `train.init_from` take the result on any mesh. An interrupted import continues when called again.
    Several processes (`jax.distributed`) share the tensors.

    Args:
        directory: Has config.json and safetensors in float32, bfloat16, float16 or DeepSeek's block-FP8.
        checkpoint: The new checkpoint's directory, which exists only once it is complete.
        overrides: `key=value` for other sections of the configuration than the model's.
        bfloat16: Round matrices to bfloat16. Otherwise every number is kept; 8 bits become float32.

    Returns:
        The checkpoint's directory.

    Raises:
        UserError: As `load_hf`; `checkpoint` exists; an override is wrong; the disk has too little room.
    """
    target = Path(checkpoint)
    check_path(target.absolute())
    found = open_hf(directory)
    companions = files_to_keep(found.files.directory)
    on_first(found.check_copies)
    config = imported_config(found, resolved(target).name, overrides)
    arrays, variables = stored_arrays(found, bfloat16), abstract_variables(found.config)
    names = {array: weight_name(array, variables[array]) for array in arrays}
    metadata = {
        "config": config_to_dict(config),
        "hf_config": found.raw_config,
        "hf_layout": describe_layout(found.config, lambda name: found.files.entry(name).dtype),
    }
    on_first(lambda: _check_room(target, arrays))
    writer = PiecewiseWriter(
        target,
        _identity(found, metadata | {"bfloat16": bfloat16}),
        {names[a]: stored for a, stored in arrays.items()},
        metadata,
    )
    mine = found.sources[jax.process_index() :: jax.process_count()]
    left = [s for s in mine if not writer.done(names[s.array], _chunk_index(s))]
    total = sum(found.files.size(s.tensor) for s in mine)
    done = total - sum(found.files.size(s.tensor) for s in left)

    where = str(found.files.directory)

    def reader(s: Source) -> ReadInto:
        dtype, stored = DTYPES[found.files.entry(s.tensor).dtype], arrays[s.array].dtype
        if dtype == stored and not s.rope:
            return checked(found.files.reader(s.tensor), dtype, where, s.tensor)  # as they are
        weights = found.files.read(s.tensor)
        if dtype != fp8.VALUES:
            check_numbers(weights, where, s.tensor)
        return array_reader(s.to_split(weights.astype(stored, copy=False)))

    def write(s: Source) -> None:
        writer.write(names[s.array], _chunk_index(s), reader(s))

    say(found)
    with BytesProgress("import", total, done, quiet=not is_first()) as progress, _nothing_left_of_bad_weights(writer):
        for s in _in_parallel(write, left):
            found.files.release(s.tensor)
            progress.advance(found.files.size(s.tensor))
    on_first(lambda: _add_files(found, companions, config, writer))
    writer.commit()
    return target


@contextlib.contextmanager
def _nothing_left_of_bad_weights(writer: PiecewiseWriter) -> Iterator[None]:
    """Remove what was written when a tensor is refused: there is nothing to go on with."""
    try:
        yield
    except UserError:
        if jax.process_count() == 1:  # of several, the others are writing
            writer.abandon()
        raise


def _in_parallel(f: Callable[[Source], None], items: Iterable[Source]) -> Iterator[Source]:
    """Call f on all, a few at a time in threads; yields each once f is done with it, in order. Raises what f raises."""
    running: deque[tuple[Source, Future]] = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        for s in items:
            running.append((s, pool.submit(f, s)))
            if len(running) == _IN_FLIGHT:
                running[0][1].result()
                yield running.popleft()[0]
        for s, future in running:
            future.result()
            yield s


def _check_room(target: Path, arrays: dict[str, ChunkedArray]) -> None:
    needed = sum(int(np.prod(a.shape)) * a.dtype.itemsize for a in arrays.values())
    existing = next(p for p in target.absolute().parents if p.exists())
    free = shutil.disk_usage(existing).free
    there = sum(p.stat().st_size for p in scratch_of(target).rglob("*") if p.is_file())  # of an import that was cut off
    if needed - there > free:
        raise UserError(f"{target} needs {needed / 1e9:.1f} GB and {existing} has {free / 1e9:.1f} GB left")


def files_to_keep(directory: Path) -> dict[str, bytes]:
    """The files that go with the weights, by their names in the checkpoint.

    Raises `UserError` as `read_companion`, and for special tokens that are none: what is imported cannot be mended.
    """
    companions = read_companions(directory)
    check_stated(companions)
    found = {f"{DIRECTORY}/{name}": content for name, content in companions.items()}
    if os.path.lexists(directory / TOKENIZER):
        found[TOKENIZER] = read_companion(directory, TOKENIZER)
    return found


def _add_files(found: HFCheckpoint, companions: dict[str, bytes], config: Config, writer: PiecewiseWriter) -> None:
    writer.add_file("config.yaml", config_to_yaml(config).encode())  # to train with: train.init_from is the checkpoint
    for name, content in companions.items():
        writer.add_file(name, content)
    in_8_bits = [s.tensor for s in found.sources if found.is_fp8(s.tensor)]
    if in_8_bits:  # what the weights alone do not say: an export gives unchanged blocks their own bytes back
        kept = [name + fp8.SUFFIX for name in in_8_bits]
        kept += [name for name in in_8_bits if fp8.loses_values(found.files.raw(name + fp8.SUFFIX))]
        tensors = {name: (DTYPES[found.files.entry(name).dtype], found.files.entry(name).shape) for name in kept}
        write_safetensors(writer.path_of(SCALES), tensors, found.files.raw)
