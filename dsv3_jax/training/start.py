"""The start of a run, up to where its first step can begin."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax

from dsv3_jax.checkpoint.load import Checkpoint
from dsv3_jax.checkpoint.manager import CheckpointManager
from dsv3_jax.checkpoint.retention import latest_metadata
from dsv3_jax.cluster.processes import broadcast_from_first, first_nonempty, is_first, on_first
from dsv3_jax.config import Config
from dsv3_jax.errors import UserError
from dsv3_jax.progress import ProgressReporter
from dsv3_jax.runs.compatible import check_compatible
from dsv3_jax.runs.directory import RunDirectory, with_absolute_paths
from dsv3_jax.runs.events import EventLog
from dsv3_jax.runs.metrics import MetricsWriter
from dsv3_jax.state.programs import Programs, compiled_now
from dsv3_jax.state.train_state import TrainState, abstract_state, init_program
from dsv3_jax.streams import say
from dsv3_jax.training.context import RunContext, TrainingData
from dsv3_jax.training.corpus import load_run_corpus
from dsv3_jax.training.initial import initial_companions, initial_layout, open_initial, with_initial_weights
from dsv3_jax.training.resolve import Resolved, program_store, resolve_for_devices
from dsv3_jax.training.signals import StopRequest
from dsv3_jax.training.teacher import check_tokenizer, open_teacher, with_weights
from dsv3_jax.training.watchdog import Watchdog

_LOCK_PATIENCE_S = 60.0  # a supervised run's processes of the attempt before may still be ending


def _last_step(run: RunDirectory, config: Config) -> int:
    """The step of the last checkpoint, 0 at a fresh start, of a run that may go on by this configuration; changes nothing."""
    step = check_compatible(run, config)
    if config.train.steps < step:
        raise UserError(f"train.steps={config.train.steps}: {run.path} has done {step} already; nothing is changed")
    return step


def _initial_state(
    resolved: Resolved, manager: CheckpointManager, data: TrainingData, programs: Programs, initial: Checkpoint | None
) -> TrainState:  # fmt: skip
    """A fresh state, or that of the latest checkpoint; then the data go on where the checkpoint left them."""
    config, layout = resolved.config, resolved.layout
    if manager.latest() is None:
        state = programs("init", init_program(config, layout))()
        return state if initial is None else with_initial_weights(config, layout, state, initial)
    state, metadata = manager.restore(abstract_state(config, layout), say)
    data.position.set_state(metadata["data"])
    return state


def start(config: Config, run: RunDirectory, elastic: bool, until_end: contextlib.ExitStack) -> tuple[RunContext, TrainState]:
    """Claim the run's directory, load data and programs, and make or restore the state. Raises `UserError` as `loop.train`.

    The lock, the watchdog, the progress bar and the signal handlers are released by `until_end`, open files by the context's
    `close`.
    """
    several = elastic or jax.process_count() > 1
    watchdog = until_end.enter_context(Watchdog(config.train.stuck_after_s, config.train.slow_after_s, enabled=several))
    # a changed corpus is accepted for this start only, and what is kept does not say so
    asked = with_absolute_paths(replace(config, data=replace(config.data, allow_changed=False)))
    last = broadcast_from_first(lambda: _last_step(run, asked))
    _, earlier = (on_first(lambda: latest_metadata(run.checkpoints)) or (None, {})) if last else (None, None)
    resolved = resolve_for_devices(asked, elastic, first_nonempty(_recipe(earlier)))
    teacher = open_teacher(resolved.config, resolved.layout, earlier)
    initial = None if last else open_initial(asked)
    tokenizer = initial.tokenizer_file() if initial and asked.data.tokenizer is None else None
    hf_layout = (earlier or {}).get("hf_layout") if last else initial_layout(initial)
    companions = run.companions() if last else initial_companions(asked, initial)
    with watchdog.paused():
        found = load_run_corpus(asked, run, earlier, tokenizer, companions, config.data.allow_changed)
    config, layout = resolved.config, resolved.layout
    data = TrainingData(config, layout, found.corpus)
    on_first(lambda: until_end.enter_context(run.claimed(_LOCK_PATIENCE_S if several else 0.0)))
    on_first(lambda: run.create(asked, None if found.own_tokenizer else found.corpus.tokenizer, companions))
    programs = program_store(resolved) if several else compiled_now
    watchdog.slow(run.deadline_file if is_first() and elastic else None)
    if teacher is not None:
        check_tokenizer(teacher, found.record["tokenizer"])
    events = EventLog(run.events_file, is_first())
    events.write("started", processes=jax.process_count(), devices=jax.device_count(), mesh=layout.axis_sizes)
    if found.changed:
        events.write("corpus_changed", what=found.changed)
    manager = CheckpointManager(run.checkpoints, config.checkpoint)
    state = _initial_state(resolved, manager, data, programs, initial)
    teacher = teacher and with_weights(teacher)
    done = int(state.step)
    progress = until_end.enter_context(ProgressReporter(config.train.steps, done, quiet=not is_first()))
    stop = until_end.enter_context(StopRequest())
    writer = MetricsWriter(run, done) if is_first() else None
    for line in (*resolved.notes, *_how_it_begins(run, config, done, found.changed, writer)):
        progress.say(line)
    events.write("restored", step=done, dropped=writer.dropped if writer else None, local=round(manager.read_locally, 3))
    context = RunContext(
        resolved, run, data, found.record, hf_layout, teacher, programs, manager, writer, events, progress, stop, watchdog
    )  # fmt: skip
    return context, state


def _how_it_begins(
    run: RunDirectory, config: Config, done: int, changed: str, writer: MetricsWriter | None
) -> Iterator[str]:  # fmt: skip
    if changed:
        yield f"the corpus has changed, as data.allow_changed allows: {changed}"
    if done:
        yield f"resuming {run.path} at step {done}"
    elif writer and writer.dropped and writer.aside:
        yield (
            f"{run.metrics_file} has {writer.dropped['steps']} steps but there is no checkpoint: the run ended before its "
            "first one was complete, or it was removed; beginning at step 0 again, and those rows are in "
            f"{writer.aside.name} now"
        )
    if done >= config.train.steps:
        yield f"nothing is left to train: train.steps={config.train.steps}"


def _recipe(earlier: dict[str, Any] | None) -> str:
    """The recipe of the steps before, if they are known."""
    config = (earlier or {}).get("config") or {}
    return (config.get("precision") or {}).get("recipe") or ""
