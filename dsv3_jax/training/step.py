"""The training step: a pure function (state, batch) -> (state, metrics), and the evaluation step beside it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from dsv3_jax.config import Config
from dsv3_jax.data.batch import Batch
from dsv3_jax.exchange.exchange import Exchange
from dsv3_jax.exchange.residual import Residual
from dsv3_jax.model.layout import Layout
from dsv3_jax.model.parameters import RouterBias
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.optim.optimizer import learning_rate
from dsv3_jax.optim.registry import optimizer_of
from dsv3_jax.precision import controller
from dsv3_jax.precision.platforms import platform_of
from dsv3_jax.precision.recipes import Recipe, recipe_of, run_by, unquantised
from dsv3_jax.precision.switch import Probe
from dsv3_jax.state.programs import Programs, compiled_now
from dsv3_jax.state.train_state import ONE_DEVICE, AbstractModel, TrainState, abstract_model, abstract_state
from dsv3_jax.training.objective import LossWeights, Metrics, Share, guide_of, objective
from dsv3_jax.training.pipelined import microbatches, pipelined_gradients
from dsv3_jax.training.teacher import Teacher

_ODD = (np.uint32(2654435761), np.uint32(2246822519), np.uint32(3266489917))  # odd factors with well-mixed bits


class StepMetrics(NamedTuple):
    """What a step tells of itself, beside the state."""

    objective: Metrics
    grad_norm: jax.Array  # before clipping
    lr: jax.Array  # the learning rate that it was made with
    max_load: jax.Array  # busiest expert's load over the mean, worst layer
    decisions: dict[str, controller.Decision]  # of the precision controller, by switch
    batch_checksum: jax.Array | None = None  # u32: see `batch_checksum`


def training_recipe(config: Config, layout: Layout) -> Recipe:
    """The configuration's recipe, its products, attention and head run by what the layout's devices have kernels for."""
    platform = platform_of(layout.device)
    return run_by(recipe_of(config.precision), platform.implementation, platform.core, platform.grouped_swiglu)


def gradients(
    config: Config,
    layout: Layout,
    state: TrainState,
    batch: Batch,
    recipe: Recipe | None = None,
    exchange: Exchange | None = None,
    teacher: Transformer | None = None,
) -> tuple[nnx.State, Metrics, dict[str, Residual]]:
    """Gradients and metrics of a batch, accumulated over `train.grad_accum_steps` microbatches.

    Args:
        recipe: that of the configuration if None.
        exchange: how gradients cross `data`: as they are if None.
        teacher: the model that `distill.teacher` names.

    Returns: gradients, with those of the recipe's probes among them; metrics; and the exchange's residuals after it.
    """
    of_rows, variables = gradient_function(config, layout, state, batch, recipe or training_recipe(config, layout), teacher)
    if layout.replicas == 1:
        return *of_rows(variables, batch), state.residuals
    grads, metrics = on_replicas(of_rows, layout.replicas)(variables, batch)
    grads, probe_grads = nnx.split_state(grads, nnx.Param, Probe)
    second_moment = optimizer_of(config).second_moment(state.opt_state)
    grads, residuals = (exchange or Exchange(layout, 0)).reduce(grads, state.residuals, second_moment)
    return nnx.merge_state(grads, sum_of_replicas(probe_grads)), sum_of_replicas(metrics), residuals


def gradient_function(
    config: Config, layout: Layout, state: TrainState, batch: Batch, recipe: Recipe, teacher: Transformer | None = None
) -> tuple[Callable[[nnx.State, Batch], tuple[nnx.State, Metrics]], nnx.State]:
    """What differentiates the objective: (variables, some rows of `batch`) -> their share of its gradients and metrics.

    Returns: that function, and the variables that have gradients: parameters and the recipe's probes.
    """
    train = config.train
    counts = batch.target_counts(config.model.num_nextn_predict_layers)
    mtp = jnp.where(state.step < train.mtp_switch_step, train.mtp_loss_weight, train.mtp_loss_weight_final)
    weights = LossWeights(mtp, train.sequence_balance_alpha)
    if teacher is not None:
        weights = weights._replace(cross_entropy=config.distill.loss_weight)
    share = Share(weights, counts, batch.rows)
    if layout.stages > 1:
        return pipelined_gradients(config, recipe, layout, state.router_bias, share), state.params
    model = abstract_model(config, recipe, layout)
    fixed = nnx.merge_state(state.router_bias, controller.flags(model.eight_bit, state.controller))
    probes = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), model.probes)

    def loss(variables: nnx.State, microbatch: Batch) -> tuple[jax.Array, Metrics]:
        guide = None if teacher is None else guide_of(teacher, microbatch, config.distill.temperature)
        return objective(nnx.merge(model.graph, variables, fixed), microbatch, share, guide)

    grad = _accumulated(jax.grad(loss, has_aux=True), train.grad_accum_steps, layout)
    return grad, nnx.merge_state(state.params, probes)


def _accumulated(f: Callable, count: int, layout: Layout) -> Callable:
    """f(variables, batch), a sum over rows, as a loop over `count` microbatches."""
    if count == 1:
        return f
    f = jax.jit(f, inline=True)  # traced once, for the shapes of its results and in the loop

    def accumulated(variables: nnx.State, batch: Batch):
        parts = microbatches(batch, count, layout)
        first = jax.tree.map(lambda a: a[0], parts)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(f, variables, first))

        def add(total, microbatch):
            return jax.tree.map(jnp.add, total, f(variables, microbatch)), None

        return jax.lax.scan(add, zeros, parts)[0]

    return accumulated


def on_replicas(f: Callable, replicas: int) -> Callable:
    """(variables, batch) -> f(variables, rows) of each of R replicas' rows, stacked: [R, ...]. Nothing crosses `data`."""

    def by_replica(variables: nnx.State, batch: Batch):
        shares = jax.tree.map(lambda a: a.reshape(replicas, -1, *a.shape[1:]), batch)
        return jax.vmap(f, in_axes=(None, 0), spmd_axis_name="data")(variables, shares)

    return by_replica


def sum_of_replicas(parts: Any) -> Any:
    """The sum over the first axis of arrays [R, ...]: an all-reduce over `data`."""
    return jax.tree.map(lambda a: a.sum(0), parts)


def after_step(model: AbstractModel, router_bias: nnx.State, load: tuple[jax.Array, ...], speed: float) -> nnx.State:
    """What the routers keep outside the gradient, after each has seen its load (see `model.router.Router.after_step`).

    `load` is that of `Metrics`, in the order of `Transformer.routers`.
    """
    live = nnx.merge(model.graph, model.params, router_bias, model.eight_bit, model.probes)
    for router, load_E in zip(live.routers, load, strict=True):
        router.after_step(load_E, speed)
    return nnx.state(live, RouterBias)


def max_load_ratio(load: tuple[jax.Array, ...]) -> jax.Array:
    """Busiest expert's load over the mean load, worst layer; 1 is perfect balance."""
    ratios = [(a.max(-1) / a.mean(-1)).max() for a in load]
    return jnp.stack(ratios).max() if ratios else jnp.float32(1)


def batch_checksum(batch: Batch) -> jax.Array:
    """u32: the sum of all tokens and segments of a batch as the devices saw it, each times a number of its row and column."""
    rows, columns = batch.tokens.shape
    row, column = (jnp.arange(n, dtype=jnp.uint32) * p + 1 for n, p in ((rows, _ODD[0]), (columns, _ODD[1])))
    both = batch.tokens.astype(jnp.uint32) + batch.segments.astype(jnp.uint32) * _ODD[2]
    return (both * row[:, None] * column).sum(dtype=jnp.uint32)


def apply_gradients(
    config: Config, state: TrainState, grads: nnx.State, metrics: Metrics, recipe: Recipe
) -> tuple[TrainState, StepMetrics]:
    """The rest of a step: clipping, the optimizer, moving average, router biases, precision controller."""
    optimizer, schedule = optimizer_of(config), learning_rate(config.optim)
    grads, probe_grads = nnx.split_state(grads, nnx.Param, Probe)
    with jax.named_scope("optimizer"):
        grad_norm = optax.tree.norm(grads)
        clip = jnp.minimum(1.0, config.optim.clip_norm / jnp.maximum(grad_norm, 1e-12))
        updates, opt_state = optimizer.update(jax.tree.map(lambda g: g * clip, grads), state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
    ema: Any = state.ema
    if ema is not None:
        ema = optax.incremental_update(params, ema, 1 - config.optim.ema_decay)
    model = abstract_model(config, recipe)
    bias = after_step(model, state.router_bias, metrics.load, config.train.bias_update_speed)
    memory, decisions = state.controller, {}
    if recipe.controlled:
        memory, decisions = controller.update(model.eight_bit, memory, probe_grads, config.precision.cooldown_steps)
    new_state = TrainState(state.step + 1, params, bias, opt_state, ema, memory, state.residuals)
    lr = jnp.asarray(schedule(state.step))
    return new_state, StepMetrics(metrics, grad_norm, lr, max_load_ratio(metrics.load), decisions)


def make_train_step(
    config: Config,
    layout: Layout = ONE_DEVICE,
    recipe: Recipe | None = None,
    compressed: bool = True,
    teacher: Teacher | None = None,
) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """The jitted step (state, batch, *teacher.weights) -> (state, metrics); it takes over the state's buffers.

    Args:
        recipe: that of the configuration if None.
        compressed: whether gradients cross `data` as `parallel.compress` says, or else as they are.
        teacher: that of `distill.teacher`; its weights may be abstract.
    """
    recipe, exchange = (
        recipe or training_recipe(config, layout),
        Exchange(layout, config.parallel.compress if compressed else 0),
    )

    def train_step(state: TrainState, batch: Batch, *weights: nnx.State) -> tuple[TrainState, StepMetrics]:
        model = None if teacher is None else teacher.model(layout, unquantised(recipe), *weights)
        grads, metrics, residuals = gradients(config, layout, state, batch, recipe, exchange, model)
        state, metrics = apply_gradients(config, replace(state, residuals=residuals), grads, metrics, recipe)
        return state, metrics._replace(batch_checksum=batch_checksum(batch))

    shardings = jax.tree.map(lambda a: a.sharding, abstract_state(config, layout))
    taught = () if teacher is None else jax.tree.map(lambda a: a.sharding, teacher.weights)
    arguments, results = (shardings, layout.batch_sharding, *taught), (shardings, layout.replicated)
    return layout.jit(train_step, arguments, results, donate=(0,))


class StepKind(NamedTuple):
    """What training steps of one run may differ in; each kind is a program."""

    recipe: Recipe
    compressed: bool  # whether gradients cross `data` as `parallel.compress` says, or still as they are


class ScheduledSteps:
    """The training steps of a run, each of the kind that `precision` and `parallel` name for it, and each kind compiled once.

    `programs` may have kept them: see state/programs.py. `teacher` is that of `distill.teacher`.
    """

    def __init__(
        self,
        config: Config,
        layout: Layout = ONE_DEVICE,
        programs: Programs = compiled_now,
        teacher: Teacher | None = None,
    ):
        self._teacher, self._weights = teacher, () if teacher is None else teacher.weights
        self._config, self._layout, self._programs, self._made = config, layout, programs, {}
        self._compresses = Exchange(layout, config.parallel.compress).compresses

    def kind(self, step: int) -> StepKind:
        """The kind of step `step`, counted from 0. The precision controller comes with the second recipe."""
        config, precision = self._config, self._config.precision
        if step < precision.first_steps:
            config = replace(config, precision=replace(precision, recipe=precision.first_recipe, controller=False))
        compressed = not self._compresses or step >= config.parallel.compress_after
        return StepKind(training_recipe(config, self._layout), compressed)

    def first_of_kinds(self) -> list[int]:
        """The first step of each kind that the run may have."""
        changes = {0, self._config.precision.first_steps, self._config.parallel.compress_after if self._compresses else 0}
        return sorted({self.kind(step): step for step in sorted(changes, reverse=True)}.values())

    def made(self, step: int) -> bool:
        """Whether the program of step `step` has been compiled."""
        return self.kind(step) in self._made

    def program(self, step: int, state: TrainState, batch: Any) -> Callable:
        """The compiled step `step`, for such a state and batch, which may be abstract."""
        kind = self.kind(step)
        if kind not in self._made:
            train_step = make_train_step(self._config, self._layout, kind.recipe, kind.compressed, self._teacher)
            name = repr(kind) if self._teacher is None else f"{kind!r} taught by {self._teacher.config!r}"
            self._made[kind] = self._programs(name, train_step, state, batch, *self._weights)
        return self._made[kind]

    def __call__(self, step: int, state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        """Raises TypeError, rather than compile again, for a state or batch of another kind than the first."""
        return self.program(step, state, batch)(state, batch, *self._weights)


def make_eval_step(
    config: Config, layout: Layout = ONE_DEVICE
) -> Callable[[nnx.State, nnx.State, Batch], tuple[jax.Array, jax.Array, jax.Array, tuple]]:
    """Jitted (params, router_bias, batch of L+1 tokens) -> sums over targets: nll in nats, correct, count; and expert loads.

    In 16 or 32 bits whatever training does. Layers are not pipelined: `pipe` serves as it does outside of a pipeline's stages.
    """
    graph = abstract_model(config, unquantised(training_recipe(config, layout)), layout.outside_pipeline).graph

    def eval_step(params: nnx.State, router_bias: nnx.State, batch: Batch):
        (count,) = batch.target_counts(0)
        share = Share(LossWeights(0.0, 0.0), [count], batch.rows)

        def of_rows(params: nnx.State, rows: Batch) -> Metrics:
            model = nnx.merge(graph, params, router_bias)
            model.mtp = nnx.List([])  # evaluation is of the next token only
            return objective(model, rows, share)[1]

        replicas = layout.replicas
        metrics = of_rows(params, batch) if replicas == 1 else sum_of_replicas(on_replicas(of_rows, replicas)(params, batch))
        return metrics.cross_entropy * count, metrics.accuracy * count, count, metrics.load

    state = jax.tree.map(lambda a: a.sharding, abstract_state(config, layout))
    arguments = (state.params, state.router_bias, layout.batch_sharding)
    return layout.jit(eval_step, arguments, layout.replicated)
