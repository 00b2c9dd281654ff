"""The training loop: data, step, watch, evaluate, report, save."""

import contextlib
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from dsv3_jax.checkpoint.manager import CheckpointManager
from dsv3_jax.cluster.processes import agree
from dsv3_jax.config import Config
from dsv3_jax.data.batches import PackedWindows, batch_windows
from dsv3_jax.data.store import Corpus
from dsv3_jax.errors import UserError
from dsv3_jax.model.layout import Layout
from dsv3_jax.precision import controller
from dsv3_jax.runs.directory import RunDirectory, run_directory
from dsv3_jax.state.train_state import TrainState
from dsv3_jax.training.context import RunContext
from dsv3_jax.training.evaluate import evaluate_store
from dsv3_jax.training.objective import Metrics
from dsv3_jax.training.start import start
from dsv3_jax.training.step import ScheduledSteps, StepMetrics, make_eval_step


@dataclass(frozen=True)
class TrainResult:
    """A run's last state, and what it was trained with."""

    config: Config  # as it was run: without `auto`
    run: RunDirectory
    state: TrainState
    corpus: Corpus
    layout: Layout
    interrupted: bool  # by a signal, after saving


def train(config: Config, root: str | Path = "runs", elastic: bool = False) -> TrainResult:
    """Train to `train.steps`, going on from the run's latest checkpoint if it has one.

    SIGINT or SIGTERM saves a checkpoint after the current step; the same call goes on from it. Beyond this, `dsv3 train` writes
    a report, a loss curve and a sample: see `dsv3_jax.training.finish`.

    Args:
        config: What to train, from `load_config`.
        root: The directory of all runs; this one is ROOT/NAME.
        elastic: Use all devices that there are, on the mesh over them that comes nearest to the configuration's.

    Returns:
        The last state, the run's directory, and what it was trained with. `interrupted` says whether a signal ended it.

    Raises:
        UserError: Bad input, a directory of another run or one that another process is training, divergence (the message names
            the last good checkpoint), or a checkpoint that cannot be written.
    """
    return train_in(run_directory(config, root), config, elastic)


def train_in(directory: RunDirectory, config: Config, elastic: bool = False) -> TrainResult:
    """`train`, in a directory that need not have the configuration's name."""
    with contextlib.ExitStack() as until_end:
        run, state = start(config, directory, elastic, until_end)
        with contextlib.closing(run):
            state, stopped = _steps(run, state)
        run.ended(int(state.step), stopped)
    return TrainResult(run.resolved.config, run.directory, state, run.data.corpus, run.resolved.layout, stopped)


def _steps(run: RunContext, state: TrainState) -> tuple[TrainState, bool]:
    """The state after the last step, and whether a signal, in this or another process, made it the last."""
    config, layout = run.resolved.config, run.resolved.layout
    train_step, eval_step = ScheduledSteps(config, layout, run.programs, run.teacher), make_eval_step(config, layout)
    step, last = int(state.step), config.train.steps
    first = step + 1
    stopping, _ = agree(run.stop.came, save=False)
    while step < last and not stopping:
        began = time.perf_counter()
        batch = run.data.next_batch()
        if not train_step.made(step):
            _compile(run, train_step, step, state, batch)
            began = time.perf_counter()
        if step + 1 == first:
            run.first_step_begins(first)
        state, metrics = train_step(step, state, batch)
        step += 1
        metrics = jax.device_get(metrics)
        row = _row(config, step, metrics, time.perf_counter() - began)
        run.watchdog.step_ended(row["step_time_s"])
        _check_health(config, run.data.source, step, metrics, run.manager)
        if step % config.train.eval_every == 0 or step == last:
            row |= _evaluate(run, eval_step, state, metrics)
        run.report(row, metrics.decisions)
        stopping, due = agree(run.stop.came, run.save_due(step))
        if due and step < last:
            run.save(state)
    if step > run.manager.newest:
        run.save(state)
    run.watchdog.slow()
    run.manager.wait()
    return state, stopping


def _compile(run: RunContext, train_step: ScheduledSteps, step: int, state: TrainState, batch: Any) -> None:
    """Compile what `step` needs, before its time is taken. No process goes on before all have."""
    run.watchdog.slow()
    train_step.program(step, state, batch)
    agree(False, False)
    run.watchdog.step_begins()


def _row(config: Config, step: int, metrics: StepMetrics, seconds: float) -> dict[str, float]:
    """A line of metrics.jsonl."""
    o = metrics.objective
    per_step = config.data.batch_size * config.data.seq_len
    return (
        {
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
        }
        | _from_teacher(o)
        | controller.shares(metrics.decisions)
    )


def _from_teacher(o: Metrics) -> dict[str, float]:
    """How far the model is from its teacher, if it has one."""
    found = {"divergence": o.divergence, "mtp_divergence": o.mtp_divergence}
    return {name: float(value) for name, value in found.items() if value is not None}


def _check_health(config: Config, source: PackedWindows, step: int, metrics: StepMetrics, manager: CheckpointManager) -> None:
    """Raise `UserError` if loss or gradient is not finite, or the loss is twice that of uniform guessing."""
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


def _evaluate(run: RunContext, eval_step: Any, state: TrainState, metrics: StepMetrics) -> dict[str, float]:
    """Held-out loss, accuracy and load, for the step's row. The step's own load goes to routing.jsonl."""
    config, step = run.resolved.config, int(state.step)
    run.watchdog.slow()

    def of(params: Any) -> Any:
        return evaluate_store(
            eval_step, params, state.router_bias, run.data.corpus.validation, config.data.seq_len, config.data.batch_size,
            config.train.eval_batches, run.resolved.layout,
        )  # fmt: skip

    result = of(state.params)
    row = {"eval_loss": result.loss, "eval_accuracy": result.accuracy, "eval_max_load": result.max_load}
    if state.ema is not None:
        row["eval_loss_ema"] = of(state.ema).loss
    run.held_out_loss = result.loss
    run.watchdog.step_begins()
    run.progress.say(f"step {step}/{config.train.steps}  held-out loss {result.loss:.4f}")
    if run.writer is not None:
        run.writer.write_routing(step, metrics.objective.load)
    return row
