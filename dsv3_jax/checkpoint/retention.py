"""The checkpoints of a run's directory: which are complete, which are kept, and the removal of the others.

Their names are their steps. Somebody may have renamed or copied one, so that a name counts only if the checkpoint is of that
step.
"""

import contextlib
import itertools
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dsv3_jax.checkpoint.manifest import MANIFEST, check_format, is_as_listed
from dsv3_jax.checkpoint.storage import METADATA, stored_metadata, stored_step
from dsv3_jax.config import CheckpointConfig

TEMPORARY = ".orbax-checkpoint-tmp"  # in the name of what Orbax has not committed
_INCOMPLETE = ".incomplete"  # ends the name of a checkpoint without a manifest that was set aside
_REMOVAL_ATTEMPTS = 50
_RETRY_S = 0.1


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit()


def _complete(directory: Path) -> dict[Path, int]:
    """The step that each checkpoint under `directory` with a number for its name and a manifest is of."""
    if not directory.is_dir():
        return {}
    found = [p for p in directory.iterdir() if _is_number(p.name) and (p / MANIFEST).is_file()]
    steps = {p: stored_step(p) for p in found}
    return {p: int(p.name) if step is None else step for p, step in steps.items()}


def complete_steps(directory: Path) -> list[int]:
    """Steps of the checkpoints under `directory` that have a manifest and are named by their step, ascending."""
    return sorted(step for path, step in _complete(directory).items() if path.name == str(step))


def newest(directory: Path) -> tuple[int, Path] | None:
    """Step and path of the complete checkpoint under `directory` with the highest step, whatever its name; None: none."""
    found = [(step, path.name == str(step), path) for path, step in _complete(directory).items()]
    if not found:
        return None
    step, _, path = max(found)
    return step, path


def latest_metadata(directory: Path) -> tuple[Path, dict[str, Any]] | None:
    """Path and metadata of the latest complete checkpoint under `directory` whose metadata are undamaged; None: none.

    Their file is read without Orbax, which would take this process's devices.
    """
    for path, _ in sorted(_complete(directory).items(), key=lambda found: found[1], reverse=True):
        if is_as_listed(path, METADATA):
            metadata = stored_metadata(path)
            if "config" in metadata:
                return path, metadata
    return None


def check_latest_format(directory: Path) -> None:
    """Raise `UserError` if the latest complete checkpoint in `directory` is of a format that this version cannot read."""
    if latest := newest(directory):
        check_format(latest[1])


def correct_names(directory: Path, report: Callable[[str], None]) -> None:
    """Name checkpoints by their steps again, and set aside those whose step has another; each gets a line to `report`."""
    for path, step in sorted(_complete(directory).items()):
        if path.name == str(step):
            continue
        own = directory / str(step)
        names = (directory / f"{path.name}.misnamed{n or ''}" for n in itertools.count())
        aside = next(name for name in names if not name.exists()) if own.exists() else own
        path.rename(aside)
        done = "renamed to" if aside == own else "set aside as"
        report(f"{path} is the checkpoint of step {step}, not of {path.name}: {done} {aside.name}")


def steps_to_keep(config: CheckpointConfig, steps: list[int], losses: Mapping[int, float | None]) -> set[int]:
    """The latest of `steps` (ascending), those of every n-th step, and those with the lowest held-out loss."""
    kept = set(steps[-config.keep :])
    if config.keep_every is not None:
        kept |= {step for step in steps if step % config.keep_every == 0}
    if config.keep_best:
        known = sorted((loss, step) for step in steps if (loss := losses.get(step)) is not None)
        kept |= {step for _, step in known[: config.keep_best]}
    return kept


def remove_old(directory: Path, config: CheckpointConfig, losses: Mapping[int, float | None]) -> None:
    """Remove all complete checkpoints but those to keep."""
    steps = complete_steps(directory)
    for step in set(steps) - steps_to_keep(config, steps, losses):
        path = directory / str(step)
        if not path.is_symlink():  # the manifest first, so that a checkpoint whose removal is cut off does not count as damaged
            (path / MANIFEST).unlink()
        _remove(path)


def remove_incomplete(directory: Path, report: Callable[[str], None]) -> None:
    """Remove what interrupted saves left: before Orbax's commit, or between that and the manifest.

    Of the latter each gets a line to `report`. Where no checkpoint is complete the last of them is set aside instead: it was
    perhaps its manifest that was lost, in copying the run, and a run that begins again would leave nothing of what was done.
    """
    for path in directory.iterdir():
        if TEMPORARY in path.name or ".manifest-" in path.name:
            _remove(path)
    cut_off = [p for p in directory.iterdir() if _is_number(p.name) and p.is_dir() and not (p / MANIFEST).is_file()]
    cut_off = sorted((p for p in cut_off if not p.is_symlink()), key=lambda p: int(p.name))
    aside = cut_off.pop() if cut_off and not _complete(directory) else None
    for path in cut_off:
        _remove(path)
        report(f"{path} has no {MANIFEST}, so that its saving was cut off: removed")
    if aside is not None:
        for old in directory.glob(f"*{_INCOMPLETE}"):
            _remove(old)
        aside.rename(aside.with_name(aside.name + _INCOMPLETE))
        report(f"{aside} has no {MANIFEST}, and no checkpoint is complete: set aside as {aside.name}{_INCOMPLETE}")


def _remove(path: Path) -> None:
    """Remove a file or directory as far as possible; of a link only itself: what it leads to may be somebody's archive."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def remove_failed(directory: Path, step: int) -> None:
    """Remove what a failed save left. Orbax's threads may still be writing there, so it is tried until nothing is left."""
    for _ in range(_REMOVAL_ATTEMPTS):
        with contextlib.suppress(OSError):
            rest = [p for p in directory.glob(f"{step}*") if _is_of_save(p.name, str(step))]
            if not rest:
                return
            for path in rest:
                _remove(path)
        time.sleep(_RETRY_S)


def _is_of_save(name: str, step: str) -> bool:
    """Whether a save of a step writes under this name; not what was set aside, nor somebody's copy such as 10.bak."""
    return name == step or name.startswith((f"{step}{TEMPORARY}", f"{step}.manifest-"))


def set_aside(directory: Path, damaged: Mapping[int, str], good: int, report: Callable[[str], None]) -> None:
    """Rename damaged checkpoints ({step: what is wrong}), so that they no longer count; `good` is the step to go back to."""
    for step, complaint in damaged.items():
        aside = directory / f"{step}.damaged"
        _remove(aside)
        (directory / str(step)).rename(aside)
        report(f"{complaint}; set aside as {aside.name}, going back to step {good}")
