"""Restoring a training state: the latest undamaged checkpoint, read from the copies on this host and the shared files."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax

from dsv3_jax.checkpoint.error_feedback import refit_loaded, templates_as_stored
from dsv3_jax.checkpoint.local import LocalCopies, LocalCopy
from dsv3_jax.checkpoint.manifest import check_format, verify
from dsv3_jax.checkpoint.names import OPTIMIZER, Arrays, joined, state_from_arrays, state_to_arrays
from dsv3_jax.checkpoint.retention import complete_steps, set_aside
from dsv3_jax.checkpoint.storage import load_arrays, optimizer_shapes, read_metadata
from dsv3_jax.cluster.processes import broadcast_from_first, first_nonempty, on_first
from dsv3_jax.errors import UserError
from dsv3_jax.state.train_state import TrainState

_ALWAYS_SHARED = "optimizer/step"  # loaded by every process where any loads some arrays: Orbax's processes meet


class Restored(NamedTuple):
    """A state as a checkpoint had it, and where it came from."""

    state: TrainState
    metadata: dict[str, Any]
    step: int
    local_share: float  # of the arrays' numbers, those in arrays that were loaded from this process's host


@dataclass(frozen=True)
class _Candidate:
    """A checkpoint that may be restored, and where its arrays are."""

    directory: Path
    templates: Arrays  # of what to load
    partial: bool  # the checkpoint has other arrays too
    copy: LocalCopy
    local: set[str]  # arrays, as `joined` names them, that this process loads from the copy
    reads_shared: bool  # whether any process loads arrays from the shared files

    def complaint(self) -> str:
        """What is wrong with this process's share of the files, or ''. Arrays that nobody reads do not matter."""
        try:
            verify(self.directory, jax.process_index(), jax.process_count(), arrays=self.reads_shared)
        except UserError as error:
            return str(error)
        return ""

    def load(self) -> Arrays:
        shared = {
            group: {name: leaf for name, leaf in leaves.items() if f"{group}/{name}" not in self.local}
            for group, leaves in self.templates.items()
        }
        shared = {group: leaves for group, leaves in shared.items() if leaves}
        partial = bool(self.local) or self.partial
        loaded = load_arrays(self.directory, shared, partial) if self.reads_shared else {}
        for group, leaves in self.templates.items():
            loaded[group] = loaded.get(group, {})
            for name, leaf in leaves.items():
                if name not in loaded[group]:
                    loaded[group][name] = self.copy.load(f"{group}/{name}", leaf)
        return loaded

    @property
    def local_share(self) -> float:
        arrays = joined(self.templates)
        return sum(arrays[name].size for name in self.local) / sum(leaf.size for leaf in arrays.values())


def _candidate(directory: Path, wanted: Arrays, copies: LocalCopies | None) -> _Candidate:
    stored = optimizer_shapes(directory)
    optimizer = templates_as_stored(wanted[OPTIMIZER], stored)
    templates, partial = wanted | {OPTIMIZER: optimizer}, bool(stored.keys() - optimizer.keys())
    if copies is None:
        return _Candidate(directory, templates, partial, LocalCopy({}), set(), reads_shared=True)
    arrays, copy = joined(templates), copies.copy_of(directory)
    local = copy.covered(arrays)
    missing = first_nonempty("" if len(local) == len(arrays) else "some of it")
    return _Candidate(directory, templates, partial, copy, local - {_ALWAYS_SHARED} if missing else local, bool(missing))


def _latest_undamaged(
    checkpoints: Path, wanted: Arrays, copies: LocalCopies | None, report: Callable[[str], None]
) -> _Candidate:  # fmt: skip
    """The same for all processes, each of which verifies a share of the files."""
    damaged: dict[int, str] = {}
    while True:
        step = broadcast_from_first(lambda: max(set(complete_steps(checkpoints)) - set(damaged), default=-1))
        if step < 0:
            raise UserError(f"no checkpoint in {checkpoints} is undamaged: {'; '.join(damaged.values())}")
        directory = checkpoints / str(step)
        on_first(functools.partial(check_format, directory))  # one that is newer is not damaged: nothing else is tried
        candidate = _candidate(directory, wanted, copies)
        complaint = first_nonempty(candidate.complaint())
        if not complaint:
            on_first(functools.partial(set_aside, checkpoints, damaged, step, report))
            return candidate
        damaged[step] = complaint


def restore(checkpoints: Path, template: TrainState, copies: LocalCopies | None, report: Callable[[str], None]) -> Restored:
    """The latest undamaged checkpoint in the directory `checkpoints`, in the shapes and shardings of `template`.

    It may have been written on another mesh by another number of processes: residuals of other replicas are refitted
    to these (error_feedback.py). Damaged ones are set aside, each with a line to `report`. Raises `UserError` if all are
    damaged or if the latest has a format that is newer than this version's.
    """
    candidate = _latest_undamaged(checkpoints, state_to_arrays(template), copies, report)
    loaded = candidate.load()
    loaded[OPTIMIZER] |= refit_loaded(template.residuals, loaded[OPTIMIZER])
    state = state_from_arrays(template, loaded)
    return Restored(state, read_metadata(candidate.directory), int(candidate.directory.name), candidate.local_share)
