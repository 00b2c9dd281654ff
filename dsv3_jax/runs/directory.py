"""The directory of a run, runs/NAME: its files, its lock, and what may change when the run goes on."""

import contextlib
import fcntl
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

from tokenizers import Tokenizer

from dsv3_jax.config import Config, config_to_dict, config_to_yaml, load_config
from dsv3_jax.data import companions
from dsv3_jax.data.companions import Companions
from dsv3_jax.data.corpus import absolute_patterns
from dsv3_jax.errors import UserError
from dsv3_jax.files import expand_home, write_atomically

# Keys that may change when a run goes on: they decide how long, how often and where, never what a step computes.
# What stands at a path is compared by its content (training/corpus.py), and a run may be copied or renamed.
_MAY_CHANGE = {
    "name",
    "train.steps", "train.eval_every", "train.eval_batches", "train.grad_accum_steps", "train.init_from",
    "train.stuck_after_s", "train.slow_after_s",
    "data.path", "data.validation_path", "data.allow_changed", "data.cache_dir",
}  # fmt: skip
# Values for what a run decided when it began, and keeps: its recipe, and its tokenizer
_AS_IT_BEGAN = {"precision.recipe": "auto", "data.tokenizer": None}
_SECTIONS_THAT_MAY_CHANGE = ("checkpoint.", "parallel.", "remat.")

SUPERVISOR_LOCK = "lock.supervisor"  # beside "lock", which each attempt's process 0 holds
# what is written before config.yaml, by the beginnings of the names
_BEFORE_CONFIG = ("events.jsonl", "logs", "lock", "tokenizer.json", companions.DIRECTORY, "config.yaml.")
_POLL_S = 0.1


def _leaves(tree: dict, prefix: str = "") -> dict[str, object]:
    found = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        found |= _leaves(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


@dataclass(frozen=True)
class RunDirectory:
    """Paths of a run's files. Nothing is read or written before a method asks for it."""

    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def tokenizer_file(self) -> Path:
        return self.path / "tokenizer.json"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def decisions_file(self) -> Path:
        return self.path / "decisions.jsonl"

    @property
    def routing_file(self) -> Path:
        return self.path / "routing.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def events_file(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def deadline_file(self) -> Path:
        """Holds the time (s since 1970) at which process 0's watchdog aborts it, for supervisors (training/watchdog.py)."""
        return self.path / "deadline"

    @property
    def logs(self) -> Path:
        """The output of a supervised run's workers, one file each."""
        return self.path / "logs"

    def check_belongs_to(self, config: Config) -> None:
        """Raise `UserError` if the directory holds a run of another configuration, or something else.

        Both are compared as they were asked for, before it was decided what `auto` means here.
        """
        if not self.path.exists():
            return
        if not self.config_file.exists():
            if self.path.is_dir() and all(p.name.startswith(_BEFORE_CONFIG) for p in self.path.iterdir()):
                return  # a run that stopped before it wrote its configuration
            raise UserError(f"{self.path} exists and is no run (no config.yaml); choose another name=...")
        old = _leaves(config_to_dict(with_absolute_paths(load_config(self.config_file))))
        for key, value in _leaves(config_to_dict(with_absolute_paths(config))).items():
            free = key in _MAY_CHANGE or (key.startswith(_SECTIONS_THAT_MAY_CHANGE) and not key.startswith("parallel.compress"))
            free = free or (key in _AS_IT_BEGAN and value == _AS_IT_BEGAN[key])
            if old.get(key) != value and not free:
                raise UserError(
                    f"{self.path} belongs to another config: {key} was {old.get(key)!r}, now {value!r}; "
                    f"choose another name=..., or go on with its own config: dsv3 resume {self.path}"
                )

    @contextlib.contextmanager
    def claimed(self, patience_s: float = 0.0, lock_name: str = "lock") -> Iterator[None]:
        """Holds the run's exclusive lock, or a supervisor's: SUPERVISOR_LOCK.

        Raises `UserError` if another process has not released it after `patience_s`.
        """
        deadline = time.monotonic() + patience_s
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / lock_name, "w")  # noqa: SIM115  (closed below)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from None
        with lock:
            while not _locked(lock):
                if time.monotonic() >= deadline:
                    raise UserError(f"{self.path} is being trained by another process; or choose another name=...")
                time.sleep(_POLL_S)
            yield

    def companions(self) -> Companions:
        """The files that came with the run's tokenizer and weights."""
        return companions.read_companions(self.path)

    def create(self, config: Config, tokenizer: Tokenizer | None, files: Companions) -> None:
        """Write config.yaml; and tokenizer.json with its companions, unless the run has its own (None).

        Raises `UserError` if the directory cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if tokenizer is not None:
                write_atomically(self.tokenizer_file, tokenizer.to_str())
                companions.write_companions(self.path, files)
            write_atomically(self.config_file, config_to_yaml(config))
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from None


def with_absolute_paths(config: Config) -> Config:
    """The configuration with paths that name the same files in every working directory."""

    def absolute(path: str | None) -> str | None:
        return path if path is None or "$" in path else str(expand_home(path).absolute())

    d = config.data
    path, held_out = (patterns and absolute_patterns(patterns) for patterns in (d.path, d.validation_path))
    data = replace(
        d, path=path, validation_path=held_out, tokenizer=absolute(d.tokenizer), cache_dir=absolute(d.cache_dir)
    )  # fmt: skip
    return replace(
        config, data=data, train=replace(config.train, init_from=absolute(config.train.init_from)),
        checkpoint=replace(config.checkpoint, local_dir=absolute(config.checkpoint.local_dir)),
    )  # fmt: skip


def _locked(file: TextIO) -> bool:
    """Try to take the lock; False while another process holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def run_directory(config: Config, root: str | Path = "runs") -> RunDirectory:
    """ROOT/NAME, where a configuration's run is."""
    return RunDirectory(Path(root) / config.name)
