"""Whether a run may go on by a configuration: as its folder has it, and as its latest checkpoint does."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dsv3_jax.checkpoint.retention import check_latest_format, latest_metadata, newest
from dsv3_jax.config import Config, config_from_dict, config_to_dict
from dsv3_jax.config_input import leaves, read_sections
from dsv3_jax.data import companions
from dsv3_jax.errors import UserError
from dsv3_jax.records import Records
from dsv3_jax.runs.directory import HOW_TO_MEND, RunDirectory, with_absolute_paths
from dsv3_jax.runs.events import is_event
from dsv3_jax.runs.metrics import last_row

# Keys that may change when a run goes on: they decide how long, how often and where, never what a step computes.
# What stands at a path is compared by its content (training/corpus.py), and a run may be copied or renamed.
_MAY_CHANGE = {
    "name",
    "train.steps", "train.eval_every", "train.eval_batches", "train.grad_accum_steps", "train.init_from",
    "train.stuck_after_s", "train.slow_after_s",
    "distill.teacher",
    "data.path", "data.validation_path", "data.allow_changed", "data.cache_dir",
}  # fmt: skip
# Values for what a run decided when it began, and keeps: its recipe, and its tokenizer
_AS_IT_BEGAN = {"precision.recipe": "auto", "data.tokenizer": None}
_SECTIONS_THAT_MAY_CHANGE = ("checkpoint.", "parallel.", "remat.")
# what is written before config.yaml, by the beginnings of the names
_BEFORE_CONFIG = ("events.jsonl", "logs", "lock", "tokenizer.json", companions.DIRECTORY, "config.yaml.")
_MOST_NAMED = 5  # keys that one line names


def check_compatible(run: RunDirectory, config: Config) -> int:
    """The step of the last checkpoint, 0 without one, of a run that may go on by this configuration; changes nothing.

    The configuration is compared with config.yaml as both were asked for, before it was decided what `auto` means here; and
    config.yaml, which somebody may have edited, with what the checkpoint was trained with.

    Raises `UserError` if the directory holds a run of another configuration or something else, or a run whose checkpoints are
    gone.
    """
    if not run.path.exists():
        return 0
    check_latest_format(run.checkpoints)
    saved = latest_metadata(run.checkpoints)
    trained = None if saved is None else config_from_dict(saved[1]["config"], str(saved[0]))
    if run.config_file.exists():
        own = run.config()
        if saved is not None and trained is not None:
            _check_own(run, own, saved[0], saved[1]["config"], trained)
        _check_asked(run, own, config)
    elif trained is not None:  # without its config.yaml, which the start writes again
        _check_asked(run, trained, config)
    elif not run.path.is_dir() or not all(p.name.startswith(_BEFORE_CONFIG) for p in run.path.iterdir()):
        raise UserError(f"{run.path} exists and is no run (no config.yaml); choose another name=...")
    for folder in (run.checkpoints, run.tensorboard, run.logs):
        if os.path.lexists(folder) and not folder.is_dir():
            raise UserError(f"{folder} is not a directory, in which the run would write: move it away")
    latest = newest(run.checkpoints)
    if latest is None:
        _check_none_is_gone(run)
    return latest[0] if latest else 0


def _may_differ(key: str, value: Any) -> bool:
    """Whether a run may go on with this value, whatever it was."""
    free = key in _MAY_CHANGE or (key.startswith(_SECTIONS_THAT_MAY_CHANGE) and not key.startswith("parallel.compress"))
    return free or (key in _AS_IT_BEGAN and value == _AS_IT_BEGAN[key])


def _different(now: Config, before: Config, may_differ: Callable[[str, Any], bool] = _may_differ) -> dict[str, tuple[Any, Any]]:
    """{key: its values before and now} where they differ and may not."""
    old, new = (leaves(config_to_dict(with_absolute_paths(config))) for config in (before, now))
    return {key: (old[key], value) for key, value in new.items() if old[key] != value and not may_differ(key, value)}


def _listed(differences: Mapping[str, tuple[Any, Any]], words: str) -> str:
    """The first few differences, each by a text with {key}, {before} and {now}."""
    named = [words.format(key=key, before=repr(a), now=repr(b)) for key, (a, b) in list(differences.items())[:_MOST_NAMED]]
    return ", ".join([*named, *_more(len(differences))])


def _more(count: int) -> list[str]:
    return [f"and {count - _MOST_NAMED} more"] if count > _MOST_NAMED else []


def _check_asked(run: RunDirectory, own: Config, asked: Config) -> None:
    if different := _different(asked, own):
        raise UserError(
            f"{run.path} belongs to another config: {_listed(different, '{key} was {before}, now {now}')}; "
            f"choose another name=..., or go on with its own config: dsv3 resume {run.path}"
        )


def _check_own(run: RunDirectory, own: Config, checkpoint: Path, stored: dict[str, Any], trained: Config) -> None:
    """Raise `UserError` if config.yaml lacks keys of a checkpoint, or has others of its values.

    `stored` is the checkpoint's configuration with the keys that there were when it was written, `trained` with all. It says
    what `auto` meant.
    """
    known = leaves(read_sections(run.config_file))
    if missing := [key for key in leaves(stored) if key not in known]:
        raise UserError(
            f"{run.config_file} is incomplete: it has no {', '.join([*missing[:_MOST_NAMED], *_more(len(missing))])}; "
            f"{HOW_TO_MEND}"
        )

    def may_differ(key: str, value: Any) -> bool:
        return _may_differ(key, value) or (key == "parallel.compress" and value == "auto")

    if different := _different(own, trained, may_differ):
        raise UserError(
            f"{run.config_file} is not what {checkpoint} was trained with: "
            f"{_listed(different, '{key} is {now} in the file, {before} in the checkpoint')}; "
            f"put back what the checkpoint has, or begin a run of another name: dsv3 train {run.config_file} name=..."
        )


def _check_none_is_gone(run: RunDirectory) -> None:
    """Raise `UserError` if there are rows of a run without a checkpoint, and its events say that there was one."""
    done = last_row(run.metrics_file).get("step", 0)
    if done and _had_checkpoint(run):
        raise UserError(
            f"{run.metrics_file} has {done} steps but there is no checkpoint in {run.checkpoints}, where there was one: put it "
            f"back, with its manifest.json, or begin a run of another name: dsv3 train {run.config_file} name=..."
        )


def _had_checkpoint(run: RunDirectory) -> bool:
    """Whether a save ever came to its end: the next save and the end of a run wait for it, and a restored step has one."""
    pending, events = False, Records(run.events_file, is_event)
    for event in events:
        if event["event"] == "started":
            pending = False
        elif event["event"] == "restored" and event.get("step"):
            return True
        elif event["event"] in ("saved", "ended"):
            if pending:
                return True
            pending = event["event"] == "saved"
    return pending and not run.checkpoints.exists()  # which a run makes before it saves
