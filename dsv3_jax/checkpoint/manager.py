"""Checkpoints on Orbax: what is in one, when one is whole, and errors that say which and why.

A checkpoint is `checkpoints/STEP/` with three sets of arrays (`weights`, `optimizer`, and `ema` where it is kept), by flat
name, and JSON metadata (config, data position). After Orbax has committed it, a manifest with every file's size and sha256
is written; only directories with a manifest count, and a manifest is verified before loading, because damaged array files
can load silently. Training goes on while a checkpoint is written.
"""

import contextlib
import functools
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp

from dsv3_jax.checkpoint import owed
from dsv3_jax.checkpoint.local import LocalCopies, LocalCopy, Snapshot, snapshot
from dsv3_jax.checkpoint.manifest import MANIFEST, verify, write_manifest_together
from dsv3_jax.cluster.processes import first_complaint, first_says, is_first, on_first
from dsv3_jax.config import CheckpointConfig
from dsv3_jax.errors import UserError
from dsv3_jax.state.train_state import TrainState

_TEMPORARY = ".orbax-checkpoint-tmp"  # in the name of what Orbax has not committed
_EVERYBODYS = "optimizer/step"  # an array that every process loads where any loads some: Orbax's processes meet
WEIGHTS = "weights"  # the set of arrays that a model needs, which all checkpoints have
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
        "optimizer": {
            "step": state.step, "opt_state": state.opt_state, "controller": state.controller, "errors": state.errors,
        },
    }  # fmt: skip
    return parts if state.ema is None else parts | {"ema": {"ema": state.ema}}


def _joined(parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """{part/name: leaf}."""
    return {f"{part}/{name}": leaf for part, leaves in parts.items() for name, leaf in leaves.items()}


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
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit() and (p / MANIFEST).is_file())


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


@dataclass
class _Save:
    """One that goes on beside training, in a thread."""

    step: int
    thread: Thread
    error: Exception | None = None


class _Found(NamedTuple):
    """What to load of a checkpoint, what this process's host has of it, and whether any process must read the shared files."""

    templates: dict[str, dict[str, Any]]
    partial: bool  # the checkpoint has other arrays too
    copy: LocalCopy
    here: set[str]  # arrays
    shared: bool


class CheckpointManager:
    """Saves and restores the training state of one run. What earlier saves that were cut off left is removed."""

    def __init__(self, directory: Path, config: CheckpointConfig):
        self._directory = directory.absolute()  # Orbax takes no other
        self._config = config
        self._save: _Save | None = None
        local = config.local_dir and Path(os.path.expandvars(config.local_dir))
        self._local = LocalCopies(local, self._directory) if local else None
        self._taken: Snapshot = {}  # the save's, for the copy on this host
        self.read_locally = 0.0  # of what was restored, the share of this process's bytes that came from its own host
        on_first(lambda: directory.mkdir(parents=True, exist_ok=True))
        on_first(self._remove_what_was_cut_off)
        self.newest = 0  # step of the last save that has begun, or of what was restored
        kept = complete_steps(self._directory) if config.keep_best else []
        self._loss = {step: _held_out_loss(self._directory / str(step)) for step in kept}

    def latest(self) -> int | None:
        """The step of the last whole checkpoint."""
        steps = complete_steps(self._directory)
        return steps[-1] if steps else None

    @property
    def failed(self) -> bool:
        """Whether the save that went on has failed: `wait` says how."""
        return self._save is not None and self._save.error is not None

    def save(self, state: TrainState, metadata: dict[str, Any]) -> None:
        """Begin the checkpoint of `state.step`, every process its shards; returns once the state is copied and may change.

        Only one save goes on at a time. Raises `UserError` if this one can't begin or the one before has failed.
        """
        self.wait()
        step = int(state.step)
        self.newest, self._loss[step] = step, metadata.get("held_out_loss")
        target = self._directory / str(step)
        if step in complete_steps(self._directory):
            return
        parts = {name: _flat(tree) for name, tree in _parts(state).items()}
        try:
            with _saving():
                response = ocp.save_checkpointables_async(str(target), parts, custom_metadata=metadata)
        except Exception as error:  # tensorstore raises what it likes; none of it may lose the previous checkpoint
            raise self._lost(step, error) from error
        if self._local is not None:
            self._taken = snapshot(_joined(parts), self._taken)
        self._save = save = _Save(step, Thread(target=lambda: self._finish(save, response), daemon=True))
        save.thread.start()

    def _finish(self, save: _Save, response: ocp.AsyncResponse) -> None:
        try:
            response.result()
            write_manifest_together(self._directory / str(save.step), jax.process_index(), jax.process_count())
            self._copy(save.step)
            if is_first():
                self._remove_old()
        except Exception as error:  # whatever it is: `wait` raises it
            save.error = error

    def _copy(self, step: int) -> None:
        """To this host. A run goes on without one."""
        if self._local is None:
            return
        try:
            self._local.write(step, jax.process_index(), self._taken, self._directory / str(step) / MANIFEST)
        except OSError as error:
            place = self._config.local_dir
            print(f"no copy of step {step} in checkpoint.local_dir={place}: {_reason(error)}", file=sys.stderr, flush=True)

    def wait(self) -> None:
        """Until the save that goes on is whole, on all processes. Raises `UserError` if it fails."""
        save, self._save = self._save, None
        if save is None:
            return
        save.thread.join()

        def check() -> None:
            if save.error is not None:
                raise self._lost(save.step, save.error) from save.error

        if not is_first():
            check()
        on_first(check)  # the others hear of it; where nothing failed, all wait for the manifest

    def close(self) -> None:
        """Let a save that goes on come to its end, also where training has failed."""
        if self._save is not None:
            self._save.thread.join()

    def free_host(self) -> None:
        """Remove the copies on this host, of a run that is done."""
        if self._local is not None:
            self._local.remove()

    def _lost(self, step: int, error: Exception) -> UserError:
        self._remove_rest(step)
        latest = self.latest()
        kept = f"the checkpoint of step {latest} is intact" if latest is not None else "there is no earlier one"
        return UserError(f"cannot save the checkpoint of step {step}: {_reason(error)}; {kept}")

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

    def _remove_what_was_cut_off(self) -> None:
        """Before Orbax's commit, or between that and the manifest."""
        whole = {str(step) for step in complete_steps(self._directory)}
        for path in self._directory.iterdir():
            if _TEMPORARY in path.name or (path.name.isdigit() and path.name not in whole):
                shutil.rmtree(path, ignore_errors=True)
            elif ".manifest-" in path.name:
                path.unlink(missing_ok=True)

    def _remove_old(self) -> None:
        """All but the latest, those of every n-th step, and those with the lowest held-out loss."""
        steps, config = complete_steps(self._directory), self._config
        kept = set(steps[-config.keep :])
        if config.keep_every is not None:
            kept |= {step for step in steps if step % config.keep_every == 0}
        if config.keep_best:
            known = sorted((loss, step) for step in steps if (loss := self._loss.get(step)) is not None)
            kept |= {step for _, step in known[: config.keep_best]}
        for step in set(steps) - kept:
            # first what makes it whole, so that one whose removal is cut off does not count as damaged
            (self._directory / str(step) / MANIFEST).unlink()
            shutil.rmtree(self._directory / str(step), ignore_errors=True)

    def restore(self, template: TrainState, say: Callable[[str], None] = print) -> tuple[TrainState, dict[str, Any]]:
        """The latest checkpoint that is undamaged, in the shapes and shardings of `template`, and its metadata.

        It may have been written on another mesh by another number of processes: what other replicas owed to their exchange is
        folded into what these do (owed.py). Damaged ones are set aside, and `say` is told. What
        `checkpoint.local_dir` has of it is read from there. Raises `UserError` if all are damaged.
        """
        trees = _parts(template)
        templates = {name: _flat(tree) for name, tree in trees.items()}
        self.newest, found = self._latest_undamaged(templates, say)
        directory = self._directory / str(self.newest)
        loaded = self._load_from_both(directory, found)
        loaded["optimizer"] |= owed.by(template.errors, loaded["optimizer"])
        parts = {name: _unflat(tree, loaded[name]) for name, tree in trees.items()}
        optimizer, weights = parts["optimizer"], parts[WEIGHTS]
        state = replace(
            template,
            step=optimizer["step"],
            opt_state=optimizer["opt_state"],
            params=weights["params"],
            router_bias=weights["router_bias"],
            ema=parts["ema"]["ema"] if "ema" in parts else None,
            controller=optimizer["controller"],
            errors=optimizer["errors"],
        )
        return state, read_metadata(directory)

    def _load_from_both(self, directory: Path, found: "_Found") -> dict[str, dict[str, Any]]:
        """Arrays by part and name: from this host those that it has, from the checkpoint the others."""
        templates = found.templates
        elsewhere = {
            part: {name: leaf for name, leaf in leaves.items() if f"{part}/{name}" not in found.here}
            for part, leaves in templates.items()
        }
        elsewhere = {part: leaves for part, leaves in elsewhere.items() if leaves}
        loaded = _load_flat(directory, elsewhere, partial=bool(found.here) or found.partial) if found.shared else {}
        for part, leaves in templates.items():
            here = {name: leaf for name, leaf in leaves.items() if name not in loaded.get(part, {})}
            loaded[part] = loaded.get(part, {}) | {n: found.copy.load(f"{part}/{n}", leaf) for n, leaf in here.items()}
        everything = _joined(templates)
        self.read_locally = sum(everything[n].size for n in found.here) / sum(leaf.size for leaf in everything.values())
        return loaded

    def _latest_undamaged(self, templates: dict[str, Any], say: Callable[[str], None]) -> tuple[int, "_Found"]:
        """Its step, the same for all processes; each reads a share of its files, without arrays if all have all of these."""
        damaged: dict[int, str] = {}
        while True:
            step = first_says(lambda: max(set(complete_steps(self._directory)) - set(damaged), default=-1))
            if step < 0:
                raise UserError(f"no checkpoint in {self._directory} is undamaged: {'; '.join(damaged.values())}")
            directory = self._directory / str(step)
            stored = _stored_shapes(directory)
            optimizer = owed.as_stored(templates["optimizer"], stored)
            there, partial = templates | {"optimizer": optimizer}, bool(stored.keys() - optimizer.keys())
            found = _Found(there, partial, LocalCopy({}), set(), shared=True)
            if self._local is not None:
                arrays, copy = _joined(there), self._local.of(step, directory / MANIFEST)
                here = copy.covered(arrays)
                missing = first_complaint("" if len(here) == len(arrays) else "some of it")
                found = _Found(there, partial, copy, here - {_EVERYBODYS} if missing else here, shared=bool(missing))
            complaint = ""
            try:
                verify(directory, jax.process_index(), jax.process_count(), arrays=found.shared)
            except UserError as error:
                complaint = str(error)
            complaint = first_complaint(complaint)
            if not complaint:
                on_first(functools.partial(self._set_aside, damaged, step, say))
                return step, found
            damaged[step] = complaint

    def _set_aside(self, damaged: dict[int, str], step: int, say: Callable[[str], None]) -> None:
        for bad, complaint in damaged.items():
            aside = self._directory / f"{bad}.damaged"
            shutil.rmtree(aside, ignore_errors=True)
            (self._directory / str(bad)).rename(aside)
            say(f"{complaint}; set aside as {aside.name}, going back to step {step}")


def _stored_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Of the arrays beside the weights; of none, if the checkpoint is so damaged: `verify` finds that out."""
    try:
        stored = ocp.checkpointables_metadata(str(directory)).metadata["optimizer"]
        return {name: tuple(array.shape) for name, array in stored.items()}
    except Exception:  # Orbax raises what it likes
        return {}


def _held_out_loss(directory: Path) -> float | None:
    try:
        return read_metadata(directory).get("held_out_loss")
    except Exception:  # a damaged one is found out before it is loaded
        return None


def _saving() -> ocp.Context:
    options = ocp.options.ArrayOptions.Saving.StorageOptions

    def in_chunks(key: Any, value: Any) -> Any:
        if not np.ndim(value):
            return None
        stacked = "_blocks/" in str(key)  # shard_axes makes a chunk of every place along an axis: of the layers alone
        return options(chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,) if stacked else ())

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
    flat = _load_flat(directory, {name: _flat(tree) for name, tree in templates.items()})
    return {name: _unflat(templates[name], flat[name]) for name in templates}


def _load_flat(directory: Path, templates: dict[str, dict[str, Any]], partial: bool = False) -> dict[str, dict[str, Any]]:
    """The arrays of some or all parts; `partial`: only some of them."""
    context = ocp.Context()
    context.pytree.loading.partial_load = partial
    try:
        with context:
            return dict(ocp.load_checkpointables(str(directory), templates))
    except Exception as error:  # the same: whatever tensorstore or Orbax raise, the file is at fault
        raise UserError(f"cannot load checkpoint {directory}: {_reason(error)}") from error


def load_weights(directory: Path, params: Any, router_bias: Any) -> tuple[Any, Any]:
    """Only what a model needs of a verified checkpoint, in the shapes and shardings of the given templates."""
    weights = _load(directory, {WEIGHTS: {"params": params, "router_bias": router_bias}})[WEIGHTS]
    return weights["params"], weights["router_bias"]
