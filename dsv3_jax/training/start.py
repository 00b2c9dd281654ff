"""The start of a run, up to where its first step can begin."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax

from dsv3_jax.checkpoint.manager import CheckpointManager
from dsv3_jax.checkpoint.retention import check_latest_format
from dsv3_jax.cluster.processes import is_first, on_first
from dsv3_jax.config import Config
from dsv3_jax.data.companions import Companions
from dsv3_jax.data.store import Corpus, load_corpus
from dsv3_jax.progress import ProgressReporter
from dsv3_jax.runs.directory import run_directory
from dsv3_jax.runs.events import EventLog
from dsv3_jax.runs.metrics import MetricsWriter
from dsv3_jax.state.programs import Programs, compiled_now
from dsv3_jax.state.train_state import TrainState, abstract_state, init_program
from dsv3_jax.streams import say
from dsv3_jax.training.context import RunContext, TrainingData
from dsv3_jax.training.initial import initial_companions, with_initial_weights
from dsv3_jax.training.resolve import Resolved, program_store, resolve_for_devices
from dsv3_jax.training.signals import StopRequest
from dsv3_jax.training.watchdog import Watchdog

_LOCK_PATIENCE_S = 60.0  # a supervised run's processes of the attempt before may still be ending


def _load_corpus(config: Config, companions: Companions) -> Corpus:
    """Process 0 first: it may have to train a tokenizer, which the others then find in the cache."""

    def load(report: Callable[[str], None]) -> Corpus:
        return load_corpus(config.data, config.model.vocab_size, report, companions)

    return on_first(lambda: load(say)) or load(lambda _: None)


def _initial_state(resolved: Resolved, manager: CheckpointManager, data: TrainingData, programs: Programs) -> TrainState:
    """A fresh state, or that of the latest checkpoint; then the data go on where the checkpoint left them."""
    config, layout = resolved.config, resolved.layout
    if manager.latest() is None:
        state = programs("init", init_program(config, layout))()
        return state if config.train.init_from is None else with_initial_weights(config, layout, state, config.train.init_from)
    state, metadata = manager.restore(abstract_state(config, layout), say)
    data.position.set_state(metadata["data"])
    return state


def start(config: Config, root: str | Path, elastic: bool, until_end: contextlib.ExitStack) -> tuple[RunContext, TrainState]:
    """Claim the run's directory, load data and programs, and make or restore the state. Raises `UserError` as `loop.train`.

    The lock, the watchdog, the progress bar and the signal handlers are released by `until_end`, open files by the context's
    `close`.
    """
    several = elastic or jax.process_count() > 1
    watchdog = until_end.enter_context(Watchdog(config.train.stuck_after_s, config.train.slow_after_s, enabled=several))
    resolved = resolve_for_devices(config, elastic)
    config, layout = resolved.config, resolved.layout
    run = run_directory(config, root)
    on_first(lambda: run.check_belongs_to(config))
    on_first(lambda: check_latest_format(run.checkpoints))  # before anything of the run is changed
    companions = run.companions()
    if companions is None:
        companions = initial_companions(config)
    corpus = _load_corpus(config, companions)
    data = TrainingData(config, layout, corpus)
    on_first(lambda: until_end.enter_context(run.claimed(_LOCK_PATIENCE_S if several else 0.0)))
    on_first(lambda: run.create(replace(config, parallel=resolved.asked.parallel), corpus.tokenizer, companions))
    programs = program_store(resolved) if several else compiled_now
    watchdog.slow(run.deadline_file if is_first() and elastic else None)
    events = EventLog(run.events_file, is_first())
    events.write("started", processes=jax.process_count(), devices=jax.device_count(), mesh=layout.axis_sizes)
    manager = CheckpointManager(run.checkpoints, config.checkpoint)
    state = _initial_state(resolved, manager, data, programs)
    done = int(state.step)
    progress = until_end.enter_context(ProgressReporter(config.train.steps, done, quiet=not is_first()))
    stop = until_end.enter_context(StopRequest())
    for note in resolved.notes:
        progress.say(note)
    if done:
        progress.say(f"resuming {run.path} at step {done}")
    if done >= config.train.steps:
        progress.say(f"nothing is left to train: train.steps={config.train.steps}")
    writer = MetricsWriter(run, done) if is_first() else None
    events.write("restored", step=done, dropped=writer.dropped if writer else None, local=round(manager.read_locally, 3))
    return RunContext(resolved, run, data, programs, manager, writer, events, progress, stop, watchdog), state
