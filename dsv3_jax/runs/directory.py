"""A run's directory, runs/NAME, its files, and who writes them: see `RunDirectory` and `MetricsWriter`."""

import contextlib
import fcntl
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tensorboardX import SummaryWriter
from tokenizers import Tokenizer

from dsv3_jax.config import Config, config_to_dict, config_to_yaml, load_config
from dsv3_jax.errors import UserError
from dsv3_jax.files import write_whole

# Keys that may change when a run goes on: they decide how long, how often and where, never what a step computes.
_MAY_CHANGE = {
    "train.steps", "train.eval_every", "train.eval_batches", "train.grad_accum_steps", "train.init_from",
    "train.stuck_after_s", "train.slow_after_s",
    "data.cache_dir",
}  # fmt: skip
_SECTIONS_THAT_MAY_CHANGE = ("checkpoint.", "parallel.", "remat.")

_BEFORE_CONFIG = ("events.jsonl", "logs", "lock", "tokenizer.json", "config.yaml.")  # names of what is there first begin so
_POLL_S = 0.1
_LAST_BYTES = 2**16  # more than a row has


def _leaves(tree: dict, prefix: str = "") -> dict[str, object]:
    found = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        found |= _leaves(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


@dataclass(frozen=True)
class RunDirectory:
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
        """By when process 0 will have ended its step, or itself."""
        return self.path / "deadline"

    @property
    def logs(self) -> Path:
        """What the workers of a supervised run print, a file each."""
        return self.path / "logs"

    def check_belongs_to(self, config: Config) -> None:
        """Raise `UserError` if the directory holds a run of another configuration, or something else."""
        if not self.path.exists():
            return
        if not self.config_file.exists():
            if self.path.is_dir() and all(p.name.startswith(_BEFORE_CONFIG) for p in self.path.iterdir()):
                return  # a run that came no further
            raise UserError(f"{self.path} exists and is no run (no config.yaml); choose another name=...")
        old = _leaves(config_to_dict(load_config(self.config_file)))
        for key, value in _leaves(config_to_dict(config)).items():
            free = key in _MAY_CHANGE or (key.startswith(_SECTIONS_THAT_MAY_CHANGE) and not key.startswith("parallel.compress"))
            if old.get(key) != value and not free:
                raise UserError(
                    f"{self.path} belongs to another config: {key} was {old.get(key)!r}, now {value!r}; "
                    f"choose another name=... or remove the directory"
                )

    @contextlib.contextmanager
    def claimed(self, patience_s: float = 0.0) -> Iterator[None]:
        """While this is so, no other process trains here. Raises `UserError` if one does, and does not end in time."""
        deadline = time.monotonic() + patience_s
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / "lock", "w")  # noqa: SIM115  (closed below)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from None
        with lock:
            while not _locked(lock):
                if time.monotonic() >= deadline:
                    raise UserError(f"{self.path} is being trained by another process; or choose another name=...")
                time.sleep(_POLL_S)
            yield

    def create(self, config: Config, tokenizer: Tokenizer) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_whole(self.tokenizer_file, tokenizer.to_str())
            write_whole(self.config_file, config_to_yaml(config))
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from None


def _locked(file: TextIO) -> bool:
    """False while another process holds the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def run_directory(config: Config, root: Path = Path("runs")) -> RunDirectory:
    return RunDirectory(root / config.name)


def _reopen(path: Path, resumed_step: int) -> tuple[TextIO, list[dict[str, Any]]]:
    """To append to, without the lines beyond the step from which a run goes on; and those."""
    rows = read_rows(path)
    kept = [row for row in rows if row["step"] <= resumed_step]
    write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))
    return open(path, "a", buffering=1), rows[len(kept) :]


class MetricsWriter:
    """metrics.jsonl (one object a step), decisions.jsonl (one object a change of precision), routing.jsonl (how many tokens
    each expert of each layer got, one object an evaluation) and TensorBoard.

    A resumed run drops what lies beyond its checkpoint.
    """

    def __init__(self, run: RunDirectory, resumed_step: int):
        self._file, again = _reopen(run.metrics_file, resumed_step)
        # steps that are done again: how many, their seconds, when the last of them ended
        seconds = sum(row["step_time_s"] for row in again)
        self.dropped = {"steps": len(again), "seconds": seconds, "last": again[-1].get("time")} if again else None
        self._decisions, _ = _reopen(run.decisions_file, resumed_step)
        self._routing, _ = _reopen(run.routing_file, resumed_step)
        self._board = SummaryWriter(str(run.path / "tensorboard"), purge_step=resumed_step + 1 if resumed_step else None)

    def write(self, row: dict[str, float]) -> None:
        self._file.write(json.dumps(row) + "\n")
        for key, value in row.items():
            if key != "step" and value is not None:
                self._board.add_scalar(key, value, int(row["step"]))

    def write_decisions(self, lines: list[dict[str, Any]]) -> None:
        """Of the precision controller; see `precision.controller.log_lines`."""
        self._decisions.writelines(json.dumps(line) + "\n" for line in lines)

    def write_routing(self, step: int, load: tuple[np.ndarray, ...]) -> None:
        """`load`: f32[layers, E] or f32[E], of a step's tokens."""
        layers = [row.astype(int).tolist() for a in load for row in a.reshape(-1, a.shape[-1])]
        self._routing.write(json.dumps({"step": step, "load": layers}) + "\n")

    def close(self) -> None:
        self._file.close()
        self._decisions.close()
        self._routing.close()
        self._board.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Of metrics.jsonl and its like, without lines that a crash has cut off."""
    rows = []
    if path.exists():
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    return rows


def last_row(path: Path) -> dict[str, Any]:
    """The last whole one of metrics.jsonl, found without reading all of it; {} if there is none."""
    if not path.exists():
        return {}
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - _LAST_BYTES))
        lines = file.read().splitlines()
    for line in reversed(lines):
        try:
            return json.loads(line)
        except json.JSONDecodeError:
            continue  # cut off, at its end or by where reading began
    return {}
