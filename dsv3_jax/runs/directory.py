"""The directory of a run, runs/NAME: its files and its lock."""

import contextlib
import fcntl
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TextIO

from tokenizers import Tokenizer

from dsv3_jax.config import Config, config_from_dict, config_to_yaml
from dsv3_jax.config_input import merge_overrides, read_sections
from dsv3_jax.data import companions
from dsv3_jax.data.companions import Companions
from dsv3_jax.data.corpus import absolute_patterns
from dsv3_jax.errors import UserError
from dsv3_jax.files import expand_home, write_atomically

SUPERVISOR_LOCK = "lock.supervisor"  # beside "lock", which each attempt's process 0 holds
HOW_TO_MEND = (  # a config.yaml that is not complete
    "put it back from a copy, or remove it and call dsv3 train with the run's own configuration, which writes it again"
)
_POLL_S = 0.1


# sections that runs of earlier versions lack; a file that was cut off lacks others, too, as they are not the last ones
_ADDED_LATER = {"distill"}


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
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

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

    def config(self, overrides: Iterable[str] = ()) -> Config:
        """The configuration in config.yaml, which has every section, with `key=value` overrides.

        Raises `UserError` if the file is missing, empty or cut off, or as `load_config`.
        """
        if not self.config_file.exists():
            raise UserError(f"{self.path} is no run: it has no config.yaml")
        raw = read_sections(self.config_file)
        sections = [section.name for section in fields(Config) if section.name not in _ADDED_LATER]
        if missing := [name for name in sections if raw.get(name) is None]:
            what = f"incomplete: it has no {', '.join(missing)}" if raw else "empty"
            raise UserError(f"{self.config_file} is {what}; {HOW_TO_MEND}")
        merge_overrides(raw, overrides, Config)
        return config_from_dict(raw, str(self.config_file))

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
        distill=replace(config.distill, teacher=absolute(config.distill.teacher)),
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
