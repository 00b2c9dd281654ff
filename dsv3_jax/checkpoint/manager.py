"""Checkpoints on Orbax: what is in one, when one is whole, and errors that say which and why.

A checkpoint is `checkpoints/STEP/` with three sets of arrays (`weights`, `optimizer`, and `ema` where it is kept), by flat
name, and JSON metadata (config, data position). After Orbax has committed it, a manifest with every file's size and sha256
is written; only directories with a manifest count, and a manifest is verified before loading, because damaged array files
can load silently.
"""

import contextlib
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp

from dsv3_jax.errors import FailedElsewhere, UserError
from dsv3_jax.parallel.processes import on_first
from dsv3_jax.train.state import TrainState

_MANIFEST = "manifest.json"
WEIGHTS = "weights"  # the set of arrays that a model needs, which all checkpoints have
_HASHING_THREADS = 4  # more than two cores can use, because some wait for the disk
_CHUNK_BYTES = 64 * 2**20  # at most, along layers first: so that a layer is read without the others
logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports every save and load at INFO and WARNING


def _flat(tree: Any) -> dict[str, Any]:
    """{path: array} with paths such as params/moe_blocks/attention/w_o_HUD."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _unflat(template: Any, flat: dict[str, Any]) -> Any:
    return jax.tree.unflatten(jax.tree.structure(template), [flat[name] for name in _flat(template)])


def _parts(state: TrainState) -> dict[str, Any]:
    parts = {
        WEIGHTS: {"params": state.params, "router_bias": state.router_bias},
        "optimizer": {"step": state.step, "opt_state": state.opt_state, "controller": state.controller},
    }
    return parts if state.ema is None else parts | {"ema": {"ema": state.ema}}


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(directory: Path) -> list[Path]:
    return sorted(p for p in directory.rglob("*") if p.is_file() and p.name != _MANIFEST)


def write_manifest(directory: Path, known: Mapping[str, list] | None = None) -> None:
    """Every file's [size, sha256] by its name within `directory`; those that are `known` are not read again."""
    names = {p.relative_to(directory).as_posix(): p for p in _files(directory)}
    listing = dict(known or {}) | {n: [p.stat().st_size, _digest(p)] for n, p in names.items() if n not in (known or {})}
    scratch = directory / f"{_MANIFEST}.tmp"
    scratch.write_text(json.dumps(listing, indent=1))
    scratch.rename(directory / _MANIFEST)


def verify(directory: Path) -> None:
    """Raise `UserError` unless `directory` is a whole checkpoint of this project."""
    try:
        listing = json.loads((directory / _MANIFEST).read_text())
        expected = {name: (size, digest) for name, (size, digest) in listing.items()}
    except FileNotFoundError:
        raise UserError(f"{directory} is not a checkpoint of dsv3_jax, or its saving was cut off (no {_MANIFEST})") from None
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{directory}: damaged {_MANIFEST}: {error}") from None
    for name, (size, _) in expected.items():
        path = directory / name
        if not path.is_file() or path.stat().st_size != size:
            found = f"{path.stat().st_size} bytes" if path.is_file() else "nothing"
            raise UserError(f"checkpoint {directory} is damaged: {name} should have {size} bytes, found {found}")
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        found = dict(zip(expected, pool.map(lambda name: _digest(directory / name), expected), strict=True))
    for name, (_, digest) in expected.items():
        if found[name] != digest:
            raise UserError(f"checkpoint {directory} is damaged: the contents of {name} do not match their sha256")


def read_metadata(directory: Path) -> dict[str, Any]:
    """The JSON saved beside the arrays: {"config": ..., "data": ...}."""
    metadata = ocp.metadata(str(directory)).custom_metadata
    if not isinstance(metadata, dict) or "config" not in metadata:
        raise UserError(f"{directory} is not a checkpoint of dsv3_jax: it holds no config")
    return metadata


def complete_steps(directory: Path) -> list[int]:
    """Steps of the whole checkpoints under `directory`, ascending."""
    if not directory.is_dir():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit() and (p / _MANIFEST).is_file())


def resolve(run_or_checkpoint: str | Path) -> Path:
    """The checkpoint directory that a run directory (its latest), a `checkpoints` directory or a checkpoint names."""
    path = Path(run_or_checkpoint).absolute()  # Orbax takes no other
    if not path.exists():
        raise UserError(f"{path} does not exist; give a run (runs/NAME) or a checkpoint (runs/NAME/checkpoints/STEP)")
    for directory in (path / "checkpoints", path):
        steps = complete_steps(directory)
        if steps:
            return directory / str(steps[-1])
    if (path / "checkpoints").is_dir() or path.name == "checkpoints":
        raise UserError(f"{path} holds no complete checkpoint yet")
    verify(path)
    return path


class CheckpointManager:
    """Saves and restores the training state of one run."""

    def __init__(self, directory: Path, keep: int):
        self._directory = directory.absolute()  # Orbax takes no other
        self._keep = keep
        on_first(lambda: directory.mkdir(parents=True, exist_ok=True))

    def latest(self) -> int | None:
        steps = complete_steps(self._directory)
        return steps[-1] if steps else None

    def save(self, state: TrainState, metadata: dict[str, Any]) -> Path:
        """Write the checkpoint of `state.step`, every process its shards; older ones beyond `keep` go once it is whole."""
        step = int(state.step)
        target = self._directory / str(step)
        if step in complete_steps(self._directory):
            return target
        on_first(lambda: shutil.rmtree(target, ignore_errors=True))  # cut off: start over
        parts = {name: _flat(tree) for name, tree in _parts(state).items()}
        try:
            with _saving():
                ocp.save_checkpointables(str(target), parts, custom_metadata=metadata)
            on_first(lambda: write_manifest(target))
        except FailedElsewhere:
            raise
        except Exception as error:  # tensorstore raises what it likes; none of it may lose the previous checkpoint
            self._remove_rest(step)
            latest = self.latest()
            kept = f"the checkpoint of step {latest} is intact" if latest is not None else "there is no earlier one"
            raise UserError(f"cannot save the checkpoint of step {step}: {_reason(error)}; {kept}") from error
        on_first(self._remove_old)
        return target

    def _remove_rest(self, step: int) -> None:
        """What a failed save left. Orbax's threads may still be writing there, so it is tried until nothing is left."""
        for _ in range(50):
            with contextlib.suppress(OSError):
                rest = [p for p in self._directory.glob(f"{step}*") if p.name.partition(".")[0] == str(step)]
                if not rest:
                    return
                for path in rest:
                    shutil.rmtree(path, ignore_errors=True)
            time.sleep(0.1)

    def _remove_old(self) -> None:
        for old in complete_steps(self._directory)[: -self._keep]:
            shutil.rmtree(self._directory / str(old), ignore_errors=True)

    def restore(self, template: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The latest checkpoint, in the shapes and shardings of `template`, and its metadata.

        It may have been written on another mesh by another number of processes.
        """
        step = self.latest()
        assert step is not None
        directory = self._directory / str(step)
        on_first(lambda: verify(directory))
        loaded = _load(directory, _parts(template))
        optimizer, weights = loaded["optimizer"], loaded[WEIGHTS]
        state = replace(
            template,
            step=optimizer["step"],
            opt_state=optimizer["opt_state"],
            params=weights["params"],
            router_bias=weights["router_bias"],
            ema=loaded["ema"]["ema"] if "ema" in loaded else None,
            controller=optimizer["controller"],
        )
        return state, read_metadata(directory)


def _saving() -> ocp.Context:
    options = ocp.options.ArrayOptions.Saving.StorageOptions

    def in_chunks(key: Any, value: Any) -> Any:
        return options(chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,)) if np.ndim(value) else None

    context = ocp.Context()
    context.array.saving.scoped_storage_options_creator = in_chunks  # type: ignore[assignment]
    return context


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:  # Orbax wraps what went wrong
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return "no space left on the device" if "No space left" in text or "ENOSPC" in text else text[:300]


def _load(directory: Path, templates: dict[str, Any]) -> dict[str, Any]:
    """Arrays of the named parts, each in the structure and shardings of its template."""
    try:
        flat = ocp.load_checkpointables(str(directory), {name: _flat(tree) for name, tree in templates.items()})
    except Exception as error:  # the same: whatever tensorstore or Orbax raise, the file is at fault
        raise UserError(f"cannot load checkpoint {directory}: {_reason(error)}") from error
    return {name: _unflat(templates[name], flat[name]) for name in templates}


def load_weights(directory: Path, params: Any, router_bias: Any) -> tuple[Any, Any]:
    """Only what a model needs of a verified checkpoint, in the shapes and shardings of the given templates."""
    weights = _load(directory, {WEIGHTS: {"params": params, "router_bias": router_bias}})[WEIGHTS]
    return weights["params"], weights["router_bias"]
