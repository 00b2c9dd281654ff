"""What a run works with besides its state: data, checkpoints, records, progress, signals and the watchdog."""

import functools
import signal
import time
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from dsv3_jax.checkpoint.manager import CheckpointManager
from dsv3_jax.config import CheckpointConfig, Config, config_to_dict
from dsv3_jax.data.batch import Batch
from dsv3_jax.data.batches import PackedWindows, train_batches
from dsv3_jax.data.store import Corpus
from dsv3_jax.model.counts import training_flops_per_token
from dsv3_jax.model.layout import Layout
from dsv3_jax.parallel.rows import local_rows, place
from dsv3_jax.precision import controller
from dsv3_jax.progress import ProgressReporter
from dsv3_jax.runs.directory import RunDirectory
from dsv3_jax.runs.events import EventLog
from dsv3_jax.runs.goodput import RunningAccount
from dsv3_jax.runs.metrics import MetricsWriter
from dsv3_jax.state.programs import Programs
from dsv3_jax.state.train_state import TrainState, abstract_model
from dsv3_jax.training.resolve import Resolved, tokens_ahead
from dsv3_jax.training.signals import StopRequest
from dsv3_jax.training.teacher import Teacher
from dsv3_jax.training.watchdog import Watchdog


class TrainingData:
    """The training batches. This process reads only the rows that its devices hold."""

    def __init__(self, config: Config, layout: Layout, corpus: Corpus):
        self.corpus, self._layout, self._batch_size = corpus, layout, config.data.batch_size
        self.source = PackedWindows(corpus.train, config.data.seq_len, tokens_ahead(config), config.train.seed, shuffle=True)
        self._rows = local_rows(layout, self._batch_size)
        self.position = train_batches(self.source, self._batch_size, self._rows)  # a grain iterator: `get_state`, `set_state`

    def next_batch(self) -> Batch:
        """The next global batch, on the layout's devices."""
        rows = jax.tree.map(np.asarray, next(self.position))
        return place(self._layout, rows, self._rows, self._batch_size)


class SaveClock:
    """Says when a checkpoint is due, by time or by step."""

    def __init__(self, config: CheckpointConfig):
        self._config = config
        self._last = time.monotonic()

    def due(self, step: int) -> bool:
        by_step = self._config.every_steps is not None and step % self._config.every_steps == 0
        return by_step or time.monotonic() - self._last >= 60 * self._config.every_minutes

    def saved(self) -> None:
        self._last = time.monotonic()


@dataclass
class RunContext:
    """A started run without its state. Whatever the loop reads, writes or reports goes through here."""

    resolved: Resolved
    directory: RunDirectory
    data: TrainingData
    corpus_record: dict[str, Any]  # what checkpoints keep about the corpus and the tokenizer (training/corpus.py)
    hf_layout: dict[str, Any] | None  # of the import that it began with (interop/hf_formats.py), for its exports
    teacher: Teacher | None  # that of `distill.teacher`
    programs: Programs
    manager: CheckpointManager
    writer: MetricsWriter | None  # process 0 has one
    events: EventLog
    progress: ProgressReporter
    stop: StopRequest
    watchdog: Watchdog
    account: RunningAccount | None = None  # process 0 has one from its first step on
    held_out_loss: float | None = None  # of the last evaluation
    clock: SaveClock = field(init=False)

    def __post_init__(self) -> None:
        self.clock = SaveClock(self.resolved.config.checkpoint)

    @functools.cached_property
    def _flops_per_token(self) -> float:
        return training_flops_per_token(self.resolved.config.model, self.resolved.config.data.seq_len)

    @functools.cached_property
    def _switches(self) -> Any:
        """The model's `EightBit` variables, which the precision controller's decisions are about."""
        return abstract_model(self.resolved.config, self.resolved.recipe).eight_bit

    def first_step_begins(self, step: int) -> None:
        """Compiling is over: from here on, time is the steps'."""
        self.events.write("compiled", step=step)
        if self.writer is not None:
            self.account = RunningAccount(self.directory, step - 1)

    def save_due(self, step: int) -> bool:
        """Whether to save now. A save that failed asks for the next one, which raises what went wrong."""
        return self.clock.due(step) or self.manager.failed

    def save(self, state: TrainState) -> None:
        """Begin a checkpoint. The event says how long that held training up."""
        about = {
            "config": config_to_dict(self.resolved.config),
            "data": self.data.position.get_state(),
            "corpus": self.corpus_record,
            "hf_layout": self.hf_layout,
            "held_out_loss": self.held_out_loss,
        }
        if self.teacher is not None:
            about["teacher"] = self.teacher.identity
        self.watchdog.slow()  # the save before this one may not be complete yet
        began = time.perf_counter()
        self.manager.save(state, about)
        stall_s = round(time.perf_counter() - began, 4)
        steps = {} if self.account is None else {"steps_s": round(self.account.steps_s, 4)}
        self.events.write("saved", step=int(state.step), stall_s=stall_s, **steps)
        self.watchdog.step_begins()
        if self.account is not None:
            self.account.costs["saving"] = stall_s
        self.clock.saved()

    def report(self, row: dict[str, float], decisions: dict[str, controller.Decision]) -> None:
        """Record a step's row of metrics.jsonl and what the precision controller decided, and show both."""
        step = int(row["step"])
        changes = controller.log_lines(step, self._switches, decisions)
        for change in changes:
            self.progress.say(controller.describe(change))
        if self.writer is not None and self.account is not None:
            row = row | self.account.row(row["step_time_s"])
            self.writer.write(row)
            self.writer.write_decisions(changes)
        self.progress.update(step, row, self._flops_per_token * row["tokens_per_s"])

    def close(self) -> None:
        """Let a save come to its end, and close the records; also where training has failed."""
        self.manager.close()
        if self.writer is not None:
            self.writer.close()

    def ended(self, step: int, stopped: bool) -> None:
        """After `close`: say how the run ended, and remove the host's copies of checkpoints if it is done."""
        self.events.write("ended", step=step)
        if stopped:
            cause = f" by {signal.Signals(self.stop.signal).name}" if self.stop.signal is not None else ""
            self.progress.say(f"stopped{cause}; saved step {step}; run again to go on")
        else:
            self.manager.free_host()
