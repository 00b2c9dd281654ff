"""The training loop: the only place that touches clock, disk, log and signals."""

import contextlib
import functools
import math
import signal
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dsv3_jax.checkpoint.manager import CheckpointManager
from dsv3_jax.cluster.processes import agree, is_first, on_first
from dsv3_jax.config import Config, config_to_dict
from dsv3_jax.cost.compression import decided, topology_of
from dsv3_jax.cost.feasible import on_mesh
from dsv3_jax.data.batches import PackedWindows, batch_windows, train_batches
from dsv3_jax.data.store import Corpus, load_corpus
from dsv3_jax.errors import UserError
from dsv3_jax.model.counts import training_flops_per_token
from dsv3_jax.model.layout import Layout
from dsv3_jax.parallel.layout import MeshLayout, batch_sharding, device_of, layout_for
from dsv3_jax.parallel.mesh import axis_sizes
from dsv3_jax.parallel.rows import local_rows, place
from dsv3_jax.precision import controller
from dsv3_jax.precision.platforms import resolve
from dsv3_jax.precision.recipes import recipe_of
from dsv3_jax.progress import ProgressReporter
from dsv3_jax.runs.directory import RunDirectory, run_directory
from dsv3_jax.runs.events import EventLog
from dsv3_jax.runs.goodput import RunningAccount
from dsv3_jax.runs.metrics import MetricsWriter
from dsv3_jax.state.programs import Programs, ProgramStore, compiled_dir, compiled_now
from dsv3_jax.state.train_state import TrainState, abstract_model, abstract_state, init_program, new_state
from dsv3_jax.train.evaluate import evaluate
from dsv3_jax.train.initial import with_its_tokenizer, with_weights
from dsv3_jax.train.pipelined import schedule_of
from dsv3_jax.train.step import ScheduledSteps, StepMetrics, make_eval_step
from dsv3_jax.train.watchdog import Watchdog

_CLAIM_S = 60.0  # for processes of an attempt before this one, which are on their way out


@dataclass(frozen=True)
class TrainResult:
    config: Config  # as it was run: without `auto`
    run: RunDirectory
    state: TrainState
    corpus: Corpus
    layout: Layout
    interrupted: bool  # by a signal, after saving


@dataclass
class _StopRequest:
    """Set by the first SIGINT or SIGTERM; the loop then ends after the current step. A second one is not caught."""

    signal: int | None = None
    _old: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> "_StopRequest":
        with contextlib.suppress(ValueError):  # only the main thread may set handlers (a notebook's worker may not)
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, _frame) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old.clear()

    def __exit__(self, *_) -> None:
        self._restore()


def _check_health(config: Config, source: PackedWindows, step: int, metrics: StepMetrics, manager: CheckpointManager) -> None:
    """Stop a run whose loss or gradient is not finite, or whose loss is twice that of knowing nothing."""
    loss, norm = float(metrics.objective.cross_entropy), float(metrics.grad_norm)
    uniform = math.log(config.model.vocab_size)
    if math.isfinite(float(metrics.objective.loss)) and math.isfinite(norm) and loss < 2 * uniform:
        return
    windows = batch_windows(config.data.batch_size, step - 1)
    names = list(dict.fromkeys(name for w in windows for name in source.document_ids(w)))
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    manager.wait()
    latest = manager.latest()
    good = f"last good checkpoint: step {latest}" if latest is not None else "no checkpoint yet"
    raise UserError(
        f"training diverged at step {step}: cross-entropy {loss:.4g} (uniform guessing gives {uniform:.4g}), gradient norm "
        f"{norm:.4g}; documents of the batch: {shown}; {good}; lower optim.lr or look at these documents"
    )


def _row(config: Config, step: int, metrics: StepMetrics, seconds: float) -> dict[str, float]:
    """One line of metrics.jsonl."""
    o = metrics.objective
    per_step = config.data.batch_size * config.data.seq_len
    return {
        "step": step,
        "loss": float(o.loss),
        "cross_entropy": float(o.cross_entropy),
        "accuracy": float(o.accuracy),
        "mtp_cross_entropy": float(o.mtp_cross_entropy),
        "balance_loss": float(o.balance_loss),
        "max_load": float(metrics.max_load),
        # copies of a token, over all layers, that travel to another device, and to another node, for their experts
        "copies_to_ranks": float(o.traffic.to_ranks) / per_step,
        "copies_to_nodes": float(o.traffic.to_nodes) / per_step,
        "grad_norm": float(metrics.grad_norm),
        "lr": float(metrics.lr),
        "tokens": step * per_step,
        "tokens_per_s": per_step / seconds,
        "step_time_s": seconds,
        "time": time.time(),  # since 1970
        "batch_checksum": int(metrics.batch_checksum),  # type: ignore[arg-type]
    } | controller.shares(metrics.decisions)


class _SaveClock:
    """Says when a checkpoint is due: by time, by step."""

    def __init__(self, config: Config):
        self._config = config.checkpoint
        self._last = time.monotonic()

    def due(self, step: int) -> bool:
        by_step = self._config.every_steps is not None and step % self._config.every_steps == 0
        return by_step or time.monotonic() - self._last >= 60 * self._config.every_minutes

    def saved(self) -> None:
        self._last = time.monotonic()


def _evaluate(config: Config, layout: Layout, eval_step, state: TrainState, corpus: Corpus) -> dict[str, float]:
    data = config.data
    limit = config.train.eval_batches

    def run(params):
        return evaluate(eval_step, params, state.router_bias, corpus.validation, data.seq_len, data.batch_size, limit, layout)

    result = run(state.params)
    row = {"eval_loss": result.loss, "eval_accuracy": result.accuracy, "eval_max_load": result.max_load}
    return row if state.ema is None else row | {"eval_loss_ema": run(state.ema).loss}


class _Data(NamedTuple):
    """What this process reads: its `rows` of every batch, from `batches`."""

    corpus: Corpus
    source: PackedWindows
    rows: list[int]
    batches: Any  # a grain iterator of these rows


def _ahead(config: Config) -> int:
    """How many tokens beyond a window its targets need."""
    return 1 + config.model.num_nextn_predict_layers


def _data(config: Config, layout: Layout, corpus: Corpus) -> _Data:
    source = PackedWindows(corpus.train, config.data.seq_len, _ahead(config), config.train.seed, shuffle=True)
    rows = local_rows(layout, config.data.batch_size)
    return _Data(corpus, source, rows, train_batches(source, config.data.batch_size, rows))


def _start(config: Config, layout: Layout, manager: CheckpointManager, data: _Data, programs: Programs) -> TrainState:
    """A fresh state, or that of the latest checkpoint, with the data moved to where it left them."""
    if manager.latest() is None:
        state = new_state(config, layout, programs)
        return state if config.train.init_from is None else with_weights(config, layout, state, config.train.init_from)
    state, metadata = manager.restore(abstract_state(config, layout), functools.partial(print, flush=True))
    data.batches.set_state(metadata["data"])
    return state


@dataclass
class _Outside:
    """What the loop tells of itself, and hears, outside of the computation."""

    run: RunDirectory
    manager: CheckpointManager
    writer: MetricsWriter | None  # of process 0
    progress: ProgressReporter
    stop: _StopRequest
    watchdog: Watchdog
    events: EventLog
    account: RunningAccount | None = None  # of process 0, once it has begun

    def save(self, state: TrainState, about: dict[str, Any]) -> None:
        """Begin a checkpoint; how long that held training up is an event."""
        self.watchdog.slow()  # the save before may still have to come to its end
        began = time.perf_counter()
        self.manager.save(state, about)
        stall_s = round(time.perf_counter() - began, 4)
        self.events.write("saved", step=int(state.step), stall_s=stall_s)
        self.watchdog.step_begins()
        if self.account is not None:
            self.account.costs["saving"] = stall_s


def _here(config: Config, elastic: bool) -> tuple[Config, Layout, str]:
    """The configuration as it is run on the devices that there are, and why gradients cross `data` as they do."""
    if elastic:
        config = on_mesh(config, jax.device_count())
    layout = layout_for(config)
    config = resolve(config, device_of(layout))
    devices = list(layout.mesh.devices.flat) if isinstance(layout, MeshLayout) else [device_of(layout)]
    config, exchange = decided(config, topology_of(devices), axis_sizes(config.parallel, len(devices)))
    return with_its_tokenizer(config), layout, exchange


def _programs(config: Config, layout: Layout) -> ProgramStore:
    devices = layout.mesh.devices.flat if isinstance(layout, MeshLayout) else jax.devices()[:1]
    return ProgramStore(compiled_dir(), config, _sizes(layout), tuple(devices))


def compile_only(config: Config, elastic: bool) -> None:
    """Compile a run's steps for the devices that there are, and keep them for a run on as many. Raises `UserError`."""
    config, layout, _ = _here(config, elastic)
    programs = _programs(config, layout)
    steps = ScheduledSteps(config, layout, programs)
    programs("init", init_program(config, layout))
    shape = config.data.batch_size, config.data.seq_len + _ahead(config)
    rows = jax.ShapeDtypeStruct(shape, np.int32, sharding=batch_sharding(layout))
    for step in steps.first_of_kinds():
        steps.program(step, abstract_state(config, layout), {"tokens": rows, "segments": rows})


def train(config: Config, root: Path = Path("runs"), elastic: bool = False) -> TrainResult:
    """Train to `train.steps`, going on from the run's latest checkpoint if it has one.

    `elastic`: on all devices that there are, on the mesh over them that comes nearest to the configuration's. Raises
    `UserError` for bad input, a directory of another run, one that another process is training, divergence (with the last good
    checkpoint named), and a checkpoint that cannot be written.
    """
    with contextlib.ExitStack() as until_end:
        return _train(config, root, elastic, until_end)


def _train(config: Config, root: Path, elastic: bool, until_end: contextlib.ExitStack) -> TrainResult:
    several = elastic or jax.process_count() > 1
    watchdog = until_end.enter_context(Watchdog(config.train.stuck_after_s, config.train.slow_after_s, enabled=several))
    asked = config.parallel
    config, layout, exchange = _here(config, elastic)
    run = run_directory(config, root)
    on_first(lambda: run.check_belongs_to(config))
    # process 0 first: it may have to train a tokenizer, which the others then find in the cache
    corpus = on_first(lambda: load_corpus(config.data, config.model.vocab_size, lambda text: print(text, flush=True)))
    corpus = corpus or load_corpus(config.data, config.model.vocab_size)
    data = _data(config, layout, corpus)
    on_first(lambda: until_end.enter_context(run.claimed(_CLAIM_S if several else 0.0)))
    on_first(lambda: run.create(replace(config, parallel=asked), corpus.tokenizer))
    programs = _programs(config, layout) if several else compiled_now
    watchdog.slow(run.deadline_file if is_first() and elastic else None)
    events = EventLog(run.events_file, is_first())
    events.write("started", processes=jax.process_count(), devices=jax.device_count(), mesh=_sizes(layout))
    manager = CheckpointManager(run.checkpoints, config.checkpoint)
    state = _start(config, layout, manager, data, programs)
    done = int(state.step)
    with ProgressReporter(config.train.steps, done, quiet=not is_first()) as progress, _StopRequest() as stop:
        for line in filter(None, [*_about_mesh(config, layout), exchange]):
            progress.say(line)
        if done:
            progress.say(f"resuming {run.path} at step {done}")
        writer = MetricsWriter(run, done) if is_first() else None
        events.write("restored", step=done, dropped=writer.dropped if writer else None, local=round(manager.read_locally, 3))
        try:
            outside = _Outside(run, manager, writer, progress, stop, watchdog, events)
            state, stopped = _steps(config, layout, ScheduledSteps(config, layout, programs), state, data, outside)
        finally:
            manager.close()
            if writer is not None:
                writer.close()
        events.write("ended", step=int(state.step))
        if stopped:
            cause = f" by {signal.Signals(stop.signal).name}" if stop.signal is not None else ""
            progress.say(f"stopped{cause}; saved step {int(state.step)}; run again to go on")
        else:
            manager.free_host()
    return TrainResult(config, run, state, corpus, layout, stopped)


def _sizes(layout: Layout) -> dict[str, int]:
    """The mesh's axes of more than one device."""
    return {a: n for a, n in layout.mesh.shape.items() if n > 1} if isinstance(layout, MeshLayout) else {}


def _about_mesh(config: Config, layout: Layout) -> list[str]:
    """What a person should know about a run's mesh."""
    unused = len(jax.devices()) - (layout.mesh.size if isinstance(layout, MeshLayout) else 1)
    lines = []
    if isinstance(layout, MeshLayout):
        axes = " x ".join(f"{axis} {size}" for axis, size in _sizes(layout).items())
        lines.append(f"{layout.mesh.size} devices in {jax.process_count()} process(es): {axes}")
        if layout.mesh.shape["pipe"] > 1:
            schedule = schedule_of(config, layout.mesh.shape["pipe"])
            lines.append(
                f"pipeline {schedule.name}: {schedule.stages} stages, {schedule.chunks} chunk(s) each, "
                f"{schedule.microbatches} microbatches (train.grad_accum_steps): occupancy {schedule.occupancy:.1%}"
            )
    if unused:
        lines.append(f"{unused} of {len(jax.devices())} devices are not used; parallel.fsdp=-1 would use them all")
    return lines


def _steps(
    config: Config, layout: Layout, train_step: ScheduledSteps, state: TrainState, data: _Data, outside: _Outside
) -> tuple[TrainState, bool]:  # fmt: skip
    """The state after the last step, and whether a signal, in this or another process, made it the last."""
    eval_step = make_eval_step(config, layout)
    flops_per_token = training_flops_per_token(config.model, config.data.seq_len)
    switches = abstract_model(config, recipe_of(config.precision)).eight_bit
    manager, writer, progress, stop, watchdog = (
        outside.manager, outside.writer, outside.progress, outside.stop, outside.watchdog
    )  # fmt: skip
    clock, held_out = _SaveClock(config), None

    def save() -> None:
        outside.save(state, {"config": config_to_dict(config), "data": data.batches.get_state(), "held_out_loss": held_out})
        clock.saved()

    step, last = int(state.step), config.train.steps
    first = step + 1
    stopping, _ = agree(stop.signal is not None, save=False)
    while step < last and not stopping:
        began = time.perf_counter()
        batch = place(layout, jax.tree.map(np.asarray, next(data.batches)), data.rows, config.data.batch_size)
        if not train_step.made(step):
            watchdog.slow()
            train_step.program(step, state, batch)
            agree(False, False)  # all have compiled
            watchdog.step_begins()
            began = time.perf_counter()
        if step + 1 == first:
            outside.events.write("compiled", step=first)
            outside.account = RunningAccount(outside.run) if writer is not None else None
        state, metrics = train_step(step, state, batch)
        step += 1
        metrics = jax.device_get(metrics)
        row = _row(config, step, metrics, time.perf_counter() - began)
        watchdog.step_ended(row["step_time_s"])
        _check_health(config, data.source, step, metrics, manager)
        if step % config.train.eval_every == 0 or step == last:
            watchdog.slow()
            row |= _evaluate(config, layout, eval_step, state, data.corpus)
            held_out = row["eval_loss"]
            watchdog.step_begins()
            progress.say(f"step {step}/{last}  held-out loss {row['eval_loss']:.4f}")
            if writer is not None:
                writer.write_routing(step, metrics.objective.load)
        changes = controller.log_lines(step, switches, metrics.decisions)
        for line in changes:
            progress.say(controller.describe(line))
        if writer is not None and outside.account is not None:
            row |= outside.account.row(row["step_time_s"])
            writer.write(row)
            writer.write_decisions(changes)
        progress.update(step, row, flops_per_token * row["tokens_per_s"])
        stopping, due = agree(stop.signal is not None, clock.due(step) or manager.failed)
        if due and step < last:
            save()
    if step > manager.newest:
        save()
    watchdog.slow()
    manager.wait()
    return state, stopping
