"""What few bits across `data` do to learning: configs/tiny.yaml on the default corpus, R replicas, several seeds.

Each run is one device's: the gradients of the R shares of a batch, then what an exchange of their codes would give all
replicas (tests/exchange/test_mean.py holds it to that). Variants, all in --bits:

  shipped         what `parallel.compress` does: ef, after --warmup steps in float32, in units of Adam's second moment
  ef              what is lost by rounding is sent with the next gradients, of both phases
  no_ef           it is lost: the control
  shipped_no_ef   as shipped, but lost
  warmup          ef, after --warmup steps in float32
  preconditioned  ef in units of Adam's second moment
  frozen          warmup, after which Adam's second moment stays (1-bit Adam, arXiv 2102.02888)
  loco            a moving average of what is lost is sent, forgotten every 512 steps (LoCo, arXiv 2407.04480)
  ef21            differences to what was sent before are sent (EF21, arXiv 2106.05203)

`full` is the mean in float32, for any R. Runs that --out (JSON lines) has are not repeated; several processes may share it.
Prints, by variant, the held-out loss against `full` with the same seeds: the mean of the differences, and its 95% interval
(Student's t). --picture draws the curves.

Example: python scripts/studies/compare_gradients.py --replicas 8 --seeds 0 1 2 --variants shipped shipped_no_ef
         python scripts/studies/compare_gradients.py --only-report --out docs/gradients.jsonl --picture docs/gradients.png
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jaxtyping import Array, Float
from matplotlib.figure import Figure
from scipy import stats

from dsv3_jax.config import Config, load_config
from dsv3_jax.data.batch import stack
from dsv3_jax.data.batches import PackedWindows, batch_windows
from dsv3_jax.data.store import load_corpus
from dsv3_jax.exchange.codec import Codec
from dsv3_jax.exchange.mean import second_moment_units
from dsv3_jax.exchange.residual import Residual
from dsv3_jax.exchange.wire import Wire, has_shares
from dsv3_jax.model.parameters import kind_of
from dsv3_jax.optim.registry import optimizer_of
from dsv3_jax.parallel.rules import is_variable
from dsv3_jax.state.train_state import ONE_DEVICE, TrainState, new_state
from dsv3_jax.training.evaluate import evaluate_store
from dsv3_jax.training.step import apply_gradients, gradient_function, make_eval_step, training_recipe

_ROOT = Path(__file__).resolve().parents[2]
_LOCO_KEPT, _LOCO_FORGETS = 0.8, 512  # of the moving average
_POINTS = 20  # of a curve
_BATCHES = 25  # of held-out text, for a curve's points; the last is of all of it


@dataclass(frozen=True)
class Variant:
    rounds: Callable | None  # (x, Residual, round, step) -> (what all replicas get, Residual)
    warmup: bool = False
    preconditioned: bool = False
    frozen: bool = False


def with_feedback(x: Array, residuals: Residual, rounded: Callable, step: Array) -> tuple[Array, Residual]:
    wanted = x + residuals.worker
    sent = rounded(wanted)
    mean = sent.mean(0) + residuals.server
    out = rounded(mean[None])[0]
    return out, Residual(wanted - sent, mean - out)


def without(x: Array, residuals: Residual, rounded: Callable, step: Array) -> tuple[Array, Residual]:
    return with_feedback(x, jax.tree.map(jnp.zeros_like, residuals), rounded, step)[0], residuals


def loco(x: Array, residuals: Residual, rounded: Callable, step: Array) -> tuple[Array, Residual]:
    out, left = with_feedback(x, residuals, rounded, step)
    average = _LOCO_KEPT * residuals.worker + (1 - _LOCO_KEPT) * left.worker
    return out, left._replace(worker=jnp.where((step + 1) % _LOCO_FORGETS == 0, 0, average))


def ef21(x: Array, residuals: Residual, rounded: Callable, step: Array) -> tuple[Array, Residual]:
    """`residuals` are what each replica, and its share's server, have sent so far."""
    worker = residuals.worker + rounded(x - residuals.worker)
    server = residuals.server + rounded((worker.mean(0) - residuals.server)[None])[0]
    return server, Residual(worker, server)


VARIANTS = {
    "full": Variant(None),
    "shipped": Variant(with_feedback, warmup=True, preconditioned=True),
    "ef": Variant(with_feedback),
    "no_ef": Variant(without),
    "shipped_no_ef": Variant(without, warmup=True, preconditioned=True),
    "warmup": Variant(with_feedback, warmup=True),
    "preconditioned": Variant(with_feedback, preconditioned=True),
    "frozen": Variant(with_feedback, warmup=True, frozen=True),
    "loco": Variant(loco),
    "ef21": Variant(ef21),
}


@dataclass(frozen=True)
class Run:
    variant: str
    replicas: int
    bits: int
    seed: int
    steps: int
    warmup: int


def in_blocks(wire: Wire) -> Callable[[Array], Array]:
    """Round arrays [any, *shape], each as its shares are."""

    def of(x: Float[Array, "any ..."]) -> Array:
        rows = jax.vmap(wire.to_blocks)(x)
        return jax.vmap(lambda a: wire.from_blocks(a, wire.replicas))(wire.codec.rounded(rows))

    return of


def averaged(
    variant: Variant, codec: Codec, x: Float[Array, "R ..."], residuals: Residual, v: Array, step: Array
) -> tuple[Array, Residual]:
    """(what all replicas get for the mean of x, residuals), `v` being Adam's second moment."""
    assert variant.rounds is not None
    rounded = in_blocks(Wire.of(x.shape[1:], x.shape[0], codec))
    unit = second_moment_units(v) if variant.preconditioned else jnp.ones_like(v)
    mean, left = variant.rounds(x / unit, jax.tree.map(lambda e: e / unit, residuals), rounded, step)
    return mean * unit, jax.tree.map(lambda e: e * unit, left)


def config_of(run: Run) -> Config:
    """tiny.yaml with its schedule stretched from 400 steps."""
    half = run.steps // 2
    return load_config(_ROOT / "configs" / "tiny.yaml", [
        f"train.steps={run.steps}", f"optim.decay_start={half}", f"optim.decay_steps={half}",
        f"train.mtp_switch_step={round(run.steps * 270 / 400)}", f"train.seed={run.seed}",
    ])  # fmt: skip


def leaves(params: nnx.State) -> list[nnx.Variable]:
    return jax.tree.leaves(params, is_leaf=is_variable)


def make_step(run: Run, config: Config) -> Callable:
    """Jitted (state, residuals by leaf, batch) -> the next two, loss."""
    variant, recipe, optimizer = VARIANTS[run.variant], training_recipe(config, ONE_DEVICE), optimizer_of(config)

    def step(state: TrainState, residuals: list[Residual | None], batch: Any):
        f, variables = gradient_function(config, ONE_DEVICE, state, batch, recipe)
        if variant.rounds is None:
            grads, metrics = f(variables, batch)
            state, _ = apply_gradients(config, state, grads, metrics, recipe)
            return state, residuals, metrics.cross_entropy
        # one after another: vmapped products of the experts take 2.5 times longer on a CPU
        shares = jax.tree.map(lambda a: a.reshape(run.replicas, -1, *a.shape[1:]), batch)
        parts, metrics = lax.map(lambda share: f(variables, share), shares)
        v = optimizer.second_moment(state.opt_state)
        assert v is not None

        def compressed() -> tuple[list, list]:
            found = [
                (x.get_value().mean(0), e) if e is None
                else averaged(variant, Codec(run.bits), x.get_value(), e, moment.get_value(), state.step)  # type: ignore[arg-type]
                for x, e, moment in zip(leaves(parts), residuals, leaves(v), strict=True)
            ]  # fmt: skip
            return [a for a, _ in found], [e for _, e in found]

        def whole() -> tuple[list, list]:
            return [x.get_value().mean(0) for x in leaves(parts)], residuals

        warm = variant.warmup and state.step < run.warmup
        means, residuals = lax.cond(warm, whole, compressed) if variant.warmup else compressed()
        # parts add up to the batch's gradients
        values = [x.replace(run.replicas * mean) for x, mean in zip(leaves(parts), means, strict=True)]
        grads = jax.tree.unflatten(jax.tree.structure(parts, is_leaf=is_variable), values)
        metrics = jax.tree.map(lambda a: a.sum(0), metrics)
        after, _ = apply_gradients(config, state, grads, metrics, recipe)
        if variant.frozen:
            kept = jax.tree.map(lambda old, new: jnp.where(warm, new, old), v, optimizer.second_moment(after.opt_state))
            after = replace(after, opt_state=optax.tree.set(after.opt_state, nu=kept))
        return after, residuals, metrics.cross_entropy

    return jax.jit(step, donate_argnums=(0, 1))


def no_residuals(run: Run, params: nnx.State) -> list[Residual | None]:
    def of(variable: nnx.Variable) -> Residual | None:
        shape = variable.get_value().shape
        if VARIANTS[run.variant].rounds is None or not kind_of(variable).compressible or not has_shares(shape, run.replicas):
            return None
        return Residual(jnp.zeros((run.replicas, *shape)), jnp.zeros(shape))

    return [of(variable) for variable in leaves(params)]


def train(run: Run) -> dict[str, Any]:
    """What --out keeps of a run: losses in nats a token."""
    config = config_of(run)
    corpus = load_corpus(config.data, config.model.vocab_size)
    source = PackedWindows(corpus.train, config.data.seq_len, 1 + config.model.num_nextn_predict_layers, run.seed, shuffle=True)
    state = new_state(config)
    step, residuals = make_step(run, config), no_residuals(run, state.params)
    eval_step = make_eval_step(config)

    def held_out(limit: int | None) -> float:
        d = config.data
        return evaluate_store(
            eval_step, state.params, state.router_bias, corpus.validation, d.seq_len, d.batch_size, limit
        ).loss

    began, losses, curve = time.perf_counter(), [], []
    for i in range(run.steps):
        batch = stack([source[w] for w in batch_windows(config.data.batch_size, i)])
        state, residuals, loss = step(state, residuals, batch)
        losses.append(float(loss))
        if (i + 1) % (run.steps // _POINTS) == 0:
            curve.append([i + 1, round(held_out(_BATCHES), 5)])
            took = time.perf_counter() - began
            print(f"{run}: step {i + 1}, held out {curve[-1][1]:.4f}, {took:.0f} s", flush=True)
    tail = losses[-run.steps // 5 :]
    return {"held_out": held_out(None), "training_tail": float(np.mean(tail)), "curve": curve}


def read(out: Path) -> dict[Run, dict[str, Any]]:
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    return {Run(**row["run"]): row for row in rows}


def wanted(args: argparse.Namespace) -> list[Run]:
    """Seed by seed, so that a comparison that is cut off is one of fewer seeds. What a run does not use is 0 in its name."""
    found = []
    for seed in args.seeds:
        for replicas in args.replicas:
            for name in ["full", *args.variants]:
                variant = VARIANTS[name]
                warmup = args.warmup if variant.warmup else 0
                run = Run(name, replicas, args.bits, seed, args.steps, warmup)
                found.append(replace(run, replicas=0, bits=0) if variant.rounds is None else run)
    return list(dict.fromkeys(found))


def compared(found: dict[Run, dict[str, Any]]) -> list[str]:
    """A table: loss of each variant, and its relative difference to `full` of the same seeds."""
    full = {run.seed: row["held_out"] for run, row in found.items() if run.variant == "full"}
    groups: dict[Run, dict[int, float]] = {}
    for run, row in found.items():
        groups.setdefault(replace(run, seed=0), {})[run.seed] = row["held_out"]
    lines = [f"{'variant':15s} {'R':>2s} {'bits':>4s} {'seeds':>5s} {'held-out loss':>15s} {'against full, %':>18s}"]
    for group, losses in groups.items():
        values = list(losses.values())
        differences = [100 * (loss / full[seed] - 1) for seed, loss in losses.items() if seed in full]
        against = "" if group.variant == "full" else _mean_and_interval(differences, "+.3f")
        lines.append(
            f"{group.variant:15s} {group.replicas or '':>2} {group.bits or '':>4} {len(values):5d} "
            f"{_mean_and_interval(values, '.4f'):>15s} {against:>18s}"
        )
    return lines


def _mean_and_interval(values: list[float], form: str) -> str:
    if len(values) < 2:
        return f"{np.mean(values):{form}}" if values else "-"
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{np.mean(values):{form}} +-{half:{form.lstrip('+')}}"


def draw(found: dict[Run, dict[str, Any]], path: Path) -> None:
    """Held-out loss over steps; and its difference to `full` of the same seed, where curves could not be told apart."""
    figure = Figure(figsize=(12.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    full = {run.seed: np.array(row["curve"]) for run, row in found.items() if run.variant == "full"}
    names = list(dict.fromkeys((run.variant, run.replicas) for run in found))
    for i, (name, replicas) in enumerate(names):
        rows = {run.seed: np.array(r["curve"]) for run, r in found.items() if (run.variant, run.replicas) == (name, replicas)}
        label = name if name == "full" else f"{name}, R={replicas}"
        mean = np.mean(list(rows.values()), 0)
        left.plot(*mean.T, label=f"{label} ({len(rows)})", color=f"C{i}", lw=1.2)
        paired = [100 * (curve[:, 1] / full[seed][:, 1] - 1) for seed, curve in rows.items() if seed in full]
        if paired and name != "full":
            right.plot(mean[:, 0], np.mean(paired, 0), color=f"C{i}", lw=1.2)
    left.set(xlabel="step", ylabel="held-out loss, nats a token", ylim=(None, left.get_ylim()[0] + 2.5))
    right.set(xlabel="step", ylabel="against full precision, same seeds, %", ylim=(-1.5, 6))
    right.axhline(0, color="0.6", lw=0.8)
    figure.legend(title="(seeds)", fontsize=8, loc="outside right upper")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--replicas", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--bits", type=int, default=2, choices=[1, 2, 4, 8])
    parser.add_argument("--warmup", type=int, default=200, help="steps in float32 of `warmup` and `frozen`")
    parser.add_argument("--variants", nargs="+", default=[v for v in VARIANTS if v != "full"], choices=list(VARIANTS))
    parser.add_argument("--out", type=Path, default=Path("runs/gradients.jsonl"))
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--only-report", action="store_true", help="of what --out has")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for run in [] if args.only_report else wanted(args):
        if run not in read(args.out):
            row = {"run": run.__dict__} | train(run)
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
    found = read(args.out)
    print("\n".join(compared(found)))
    if args.picture:
        draw(found, args.picture)


if __name__ == "__main__":
    main()
