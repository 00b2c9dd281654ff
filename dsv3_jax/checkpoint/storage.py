"""Arrays to and from disk by Orbax: chunk sizes, partial loads, the metadata beside the arrays, and errors with a reason."""

import functools
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint.experimental.v1 as ocp

from dsv3_jax.checkpoint.integers import dequantized, integer_arrays, integer_templates
from dsv3_jax.checkpoint.names import OPTIMIZER, Arrays, weights_from_arrays, weights_to_arrays
from dsv3_jax.checks import is_text, require
from dsv3_jax.errors import UserError

METADATA = "_CHECKPOINT_METADATA"  # Orbax's file with the metadata that are given to it
_CHUNK_BYTES = 64 * 2**20  # at most, along layers first: so that a layer is read without the others
# An array that several devices hold is written in slices, one by each; of small ones each slice would cost more, a compiled
# program of its own in a process's first save, than it spares.
_SMALLEST_SLICE_BYTES = 2**20
# Orbax reports every save and load at INFO and WARNING, and with stacks at ERROR what it raises as well
logging.getLogger("absl").setLevel(logging.CRITICAL)


def _storage_options(key: Any, value: Any) -> Any:
    if not np.ndim(value):
        return None
    stacked = "_blocks/" in str(key)  # shard_axes makes a chunk of every index along an axis: of the layers alone
    return ocp.options.ArrayOptions.Saving.StorageOptions(chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,) if stacked else ())


def check_path(directory: Path) -> None:
    """Raise `UserError` for a path that TensorStore cannot take, before anything is computed that could not be saved there."""
    require(is_text(str(directory)), f"{directory} cannot hold checkpoints: the path has bytes that are no UTF-8; rename it")


def begin_save(directory: Path, arrays: Arrays, metadata: dict[str, Any]) -> ocp.AsyncResponse:
    """Write arrays in the background; returns once they are copied, so that the caller may overwrite them."""
    context = ocp.Context()
    context.array.saving.scoped_storage_options_creator = _storage_options  # type: ignore[assignment]
    context.array.saving.min_slice_bytes_for_replica_parallel = _SMALLEST_SLICE_BYTES
    with context:
        return ocp.save_checkpointables_async(str(directory), arrays, custom_metadata=metadata)


def load_arrays(directory: Path, templates: Arrays, partial: bool = False) -> Arrays:
    """The arrays of some sets, in the shapes and shardings of their templates; `partial`: the sets hold others too.

    Raises `UserError` if they cannot be read.
    """
    context = ocp.Context()
    context.pytree.loading.partial_load = partial
    try:
        with context:
            return dict(ocp.load_checkpointables(str(directory), templates))
    except Exception as error:  # whatever TensorStore or Orbax raise, the file is at fault
        raise UserError(f"cannot load checkpoint {directory}: {reason(error)}") from error


def load_weights(directory: Path, params: Any, router_bias: Any, keep_integers: bool = False) -> tuple[Any, Any]:
    """Only what a model needs of a verified checkpoint, in the shapes and shardings of the given templates.

    Integer weights become the dense ones that they stand for, or stay as they are with `keep_integers`.
    """
    integers = integer_arrays(read_metadata(directory), str(directory))
    templates = integer_templates(params, integers) if integers else params
    arrays = load_arrays(directory, weights_to_arrays(templates, router_bias))
    loaded, bias = weights_from_arrays(templates, router_bias, arrays)
    return (dequantized(loaded, params) if integers and not keep_integers else loaded), bias


def read_metadata(directory: Path) -> dict[str, Any]:
    """The JSON saved beside the arrays: {"config": ..., "step": ..., ...}. Raises `UserError` if it is not ours."""
    metadata = ocp.metadata(str(directory)).custom_metadata
    if not isinstance(metadata, dict) or "config" not in metadata:
        raise UserError(f"{directory} is not a checkpoint of dsv3_jax: it holds no config")
    return metadata


def stored_metadata(directory: Path) -> dict[str, Any]:
    """What a checkpoint's file of metadata holds, read without Orbax and whoever wrote it; {} if it is damaged or missing."""
    try:
        metadata = json.loads((directory / METADATA).read_bytes())["custom_metadata"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def stored_step(directory: Path) -> int | None:
    """The step that a checkpoint's metadata say it is of; None if they do not, or cannot be read (`verify` says why).

    Only their file is read, and only once, since all of a run's checkpoints are listed for every save.
    """
    try:
        stat = (directory / METADATA).stat()
    except OSError:
        return None
    return _stored_step(directory, stat.st_ino, stat.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _stored_step(directory: Path, _inode: int, _mtime_ns: int) -> int | None:
    metadata = stored_metadata(directory)
    data = metadata.get("data")
    if not isinstance(data, dict):
        return None
    step = metadata.get("step", data.get("next_index"))  # earlier versions kept the batches that were read
    return step if type(step) is int and 0 <= step < 2**63 else None


def optimizer_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the stored arrays of the set OPTIMIZER; none if the checkpoint is so damaged, which `verify` finds out."""
    try:
        stored = ocp.checkpointables_metadata(str(directory)).metadata[OPTIMIZER]
        return {name: tuple(array.shape) for name, array in stored.items()}
    except Exception:  # Orbax raises what it likes
        return {}


def reason(error: BaseException) -> str:
    """What went wrong, in one line: the innermost cause of an error of Orbax or TensorStore."""
    while error.__cause__ is not None:  # Orbax wraps what went wrong
        error = error.__cause__
    named = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename is not None else ""
    text = " ".join((named or str(error)).split()) or type(error).__name__
    return "no space left on the device" if "No space left" in text or "ENOSPC" in text else text[:300]
