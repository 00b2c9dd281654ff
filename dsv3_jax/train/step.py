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
from dsv3_jax.exchange.compress import Errors
from dsv3_jax.exchange.exchange import Exchange
from dsv3_jax.model.layout import Layout
from dsv3_jax.optim.adamw import learning_rate, second_moment
from dsv3_jax.precision import controller
from dsv3_jax.precision.platforms import platform_of
from dsv3_jax.precision.recipes import Recipe, recipe_of, run_by, unquantised
from dsv3_jax.precision.switch import Probe
from dsv3_jax.state.programs import Programs, compiled_now
from dsv3_jax.state.train_state import ONE_DEVICE, TrainState, abstract_model, abstract_state, optimizer_of
from dsv3_jax.train.objective import Batch, LossWeights, Metrics, Share, objective, target_counts
from dsv3_jax.train.pipelined import microbatches, pipelined_gradients

_ODD = (np.uint32(2654435761), np.uint32(2246822519), np.uint32(3266489917))  # of well-mixed bits


class StepMetrics(NamedTuple):
    objective: Metrics
    grad_norm: jax.Array  # before clipping
    lr: jax.Array
    max_load: jax.Array  # busiest expert's load over the mean, worst layer
    decisions: dict[str, controller.Decision]  # of the precision controller, by switch
    batch_checksum: jax.Array | None = None  # u32: of every token of the batch at its place, as the devices saw it


def _summed(parts: Any) -> Any:
    return jax.tree.map(lambda a: a.sum(0), parts)


def over_replicas(f: Callable, replicas: int, reduce: Callable = _summed) -> Callable:
    """f(params, batch), a sum over the batch, as `reduce` of those of the replicas of `data`, their first axis.

    Each replica works by itself on its share of the rows; nothing else crosses `data`.
    """
    if replicas == 1:
        return f

    def reduced(params, batch: Batch):
        shares = jax.tree.map(lambda a: a.reshape(replicas, -1, *a.shape[1:]), batch)
        return reduce(jax.vmap(f, in_axes=(None, 0), spmd_axis_name="data")(params, shares))

    return reduced


def training_recipe(config: Config, layout: Layout) -> Recipe:
    """The configuration's, with its products, attention and head run by what the layout's devices have kernels for."""
    platform = platform_of(layout.device)
    return run_by(recipe_of(config.precision), platform.implementation, platform.core, platform.grouped_swiglu)


def replica_gradients(
    config: Config, layout: Layout, state: TrainState, batch: Batch, recipe: Recipe
) -> tuple[Callable, nnx.State]:
    """((variables, rows of the batch) -> their part of the gradients and metrics, the variables)."""
    train = config.train
    counts = target_counts(batch["segments"], config.model.num_nextn_predict_layers)
    mtp = jnp.where(state.step < train.mtp_switch_step, train.mtp_loss_weight, train.mtp_loss_weight_final)
    share = Share(LossWeights(mtp, train.sequence_balance_alpha), counts, batch["tokens"].shape[0])
    if layout.stages > 1:
        return pipelined_gradients(config, recipe, layout, state.router_bias, share), state.params
    model = abstract_model(config, recipe, layout)
    fixed = nnx.merge_state(state.router_bias, controller.flags(model.eight_bit, state.controller))
    probes = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), model.probes)
    return _accumulated_gradients(config, layout, model.graph, fixed, share), nnx.merge_state(state.params, probes)


def gradients(
    config: Config, layout: Layout, state: TrainState, batch: Batch, recipe: Recipe | None = None, reduce: Callable = _summed
) -> Any:
    """Gradients and metrics of the whole batch, accumulated over `train.grad_accum_steps` microbatches.

    In the configuration's recipe if none is given. Gradients have those of the probes among them, if the recipe has any.
    `reduce` makes what is returned of those of several replicas.
    """
    f, variables = replica_gradients(config, layout, state, batch, recipe or training_recipe(config, layout))
    return over_replicas(f, layout.replicas, reduce)(variables, batch)


def exchanged_gradients(
    config: Config, layout: Layout, state: TrainState, batch: Batch, recipe: Recipe, exchange: Exchange
) -> tuple[nnx.State, Metrics, dict[str, Errors]]:
    """Those of `gradients` as they come out of the exchange over `data`, and what is owed to the next one."""
    if exchange.replicas == 1:
        return *gradients(config, layout, state, batch, recipe), state.errors

    def reduce(parts: tuple[nnx.State, Metrics]) -> tuple[nnx.State, Metrics, dict[str, Errors]]:
        grads, metrics = parts
        grads, probes = nnx.split_state(grads, nnx.Param, Probe)
        grads, errors = exchange.sum(grads, state.errors, second_moment(state.opt_state))
        return nnx.merge_state(grads, _summed(probes)), _summed(metrics), errors

    return gradients(config, layout, state, batch, recipe, reduce)


def _accumulated_gradients(config: Config, layout: Layout, graph: nnx.GraphDef, fixed: nnx.State, share: Share) -> Callable:
    """(variables, batch) -> gradients, metrics; `fixed` are the variables that have no gradient."""
    accum = config.train.grad_accum_steps

    def loss(variables, microbatch):
        return objective(nnx.merge(graph, variables, fixed), microbatch, share)

    def accumulated(params, batch):
        grad = jax.grad(loss, has_aux=True)
        if accum == 1:
            return grad(params, batch)
        parts = microbatches(batch, accum, layout)
        first = jax.tree.map(lambda a: a[0], parts)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(grad, params, first))

        def add(total, microbatch):
            return jax.tree.map(jnp.add, total, grad(params, microbatch)), None

        return jax.lax.scan(add, zeros, parts)[0]

    return accumulated


def update_router_bias(router_bias: nnx.State, load: tuple[jax.Array, ...], speed: float) -> nnx.State:
    """Raise the bias of experts below the mean load by `speed`, lower that of those above (section 2.1.2).

    `load` comes in the order in which layers run, stacked MoE layers first and MTP modules after, which is also the
    order of the leaves of `router_bias`.
    """
    leaves, treedef = jax.tree.flatten(router_bias)
    loads = [a.reshape(b.shape) for a, b in zip(load, leaves, strict=True)]
    moved = [b + speed * jnp.sign(a.mean(-1, keepdims=True) - a) for a, b in zip(loads, leaves, strict=True)]
    return jax.tree.unflatten(treedef, moved)


def max_load_ratio(load: tuple[jax.Array, ...]) -> jax.Array:
    """Busiest expert's load over the mean load, worst layer; 1 is perfect balance."""
    ratios = [(a.max(-1) / a.mean(-1)).max() for a in load]
    return jnp.stack(ratios).max() if ratios else jnp.float32(1)


def batch_checksum(batch: Batch) -> jax.Array:
    """u32: of all tokens and segments of a batch, modulo 2^32, each times a number of its row and column."""
    rows, columns = batch["tokens"].shape
    row, column = (jnp.arange(n, dtype=jnp.uint32) * p + 1 for n, p in ((rows, _ODD[0]), (columns, _ODD[1])))
    both = batch["tokens"].astype(jnp.uint32) + batch["segments"].astype(jnp.uint32) * _ODD[2]
    return (both * row[:, None] * column).sum(dtype=jnp.uint32)


def apply_gradients(
    config: Config, state: TrainState, grads: nnx.State, metrics: Metrics, recipe: Recipe
) -> tuple[TrainState, StepMetrics]:
    """The rest of a step: clipping, AdamW, moving average, router biases, precision controller."""
    optimizer, schedule = optimizer_of(config), learning_rate(config.optim)
    grads, told = nnx.split_state(grads, nnx.Param, Probe)
    with jax.named_scope("optimizer"):
        grad_norm = optax.tree.norm(grads)
        clip = jnp.minimum(1.0, config.optim.clip_norm / jnp.maximum(grad_norm, 1e-12))
        updates, opt_state = optimizer.update(jax.tree.map(lambda g: g * clip, grads), state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
    ema: Any = state.ema
    if ema is not None:
        ema = optax.incremental_update(params, ema, 1 - config.optim.ema_decay)
    bias = update_router_bias(state.router_bias, metrics.load, config.train.bias_update_speed)
    memory, decisions = state.controller, {}
    if recipe.controlled:
        template = abstract_model(config, recipe).eight_bit
        memory, decisions = controller.update(template, memory, told, config.precision.cooldown_steps)
    new_state = TrainState(state.step + 1, params, bias, opt_state, ema, memory, state.errors)
    lr = jnp.asarray(schedule(state.step))
    return new_state, StepMetrics(metrics, grad_norm, lr, max_load_ratio(metrics.load), decisions)


def make_train_step(
    config: Config, layout: Layout = ONE_DEVICE, recipe: Recipe | None = None, whole: bool = False
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """The jitted step, in the configuration's recipe if none is given; it takes over the state's buffers.

    `whole`: gradients cross `data` as they are, whatever `parallel.compress` says.
    """
    products, exchange = recipe or training_recipe(config, layout), Exchange(layout, 0 if whole else config.parallel.compress)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        grads, metrics, errors = exchanged_gradients(config, layout, state, batch, products, exchange)
        state, metrics = apply_gradients(config, replace(state, errors=errors), grads, metrics, products)
        return state, metrics._replace(batch_checksum=batch_checksum(batch))

    shardings = jax.tree.map(lambda a: a.sharding, abstract_state(config, layout))
    arguments, results = (shardings, layout.batch_sharding), (shardings, layout.replicated)
    return layout.jit(train_step, arguments, results, donate=(0,))


class StepKind(NamedTuple):
    recipe: Recipe
    whole: bool  # gradients that would cross `data` in few bits later


class ScheduledSteps:
    """The training steps of a run, each of the kind that `precision` and `parallel` name for it, and each kind compiled once.

    `programs` may have kept them: see compiled.py.
    """

    def __init__(self, config: Config, layout: Layout = ONE_DEVICE, programs: Programs = compiled_now):
        self._config, self._layout, self._programs, self._made = config, layout, programs, {}
        self._exchanges = Exchange(layout, config.parallel.compress).replicas > 1

    def kind(self, step: int) -> StepKind:
        """Of step `step`, counted from 0. The precision controller comes with the second recipe."""
        config, precision = self._config, self._config.precision
        if step < precision.first_steps:
            config = replace(config, precision=replace(precision, recipe=precision.first_recipe, controller=False))
        whole = self._exchanges and step < config.parallel.compress_after
        return StepKind(training_recipe(config, self._layout), whole)

    def first_of_kinds(self) -> list[int]:
        """The first step of each kind that the run may have."""
        changes = {0, self._config.precision.first_steps, self._config.parallel.compress_after if self._exchanges else 0}
        return sorted({self.kind(step): step for step in sorted(changes, reverse=True)}.values())

    def made(self, step: int) -> bool:
        return self.kind(step) in self._made

    def program(self, step: int, state: TrainState, batch: Any) -> Callable:
        """Step `step`'s, for such a state and batch, which may be abstract."""
        kind = self.kind(step)
        if kind not in self._made:
            train_step = make_train_step(self._config, self._layout, kind.recipe, kind.whole)
            self._made[kind] = self._programs(repr(kind), train_step, state, batch)
        return self._made[kind]

    def __call__(self, step: int, state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        """Raises TypeError, rather than compile again, for a state or batch of another kind than the first."""
        return self.program(step, state, batch)(state, batch)


def make_eval_step(
    config: Config, layout: Layout = ONE_DEVICE
) -> Callable[[nnx.State, nnx.State, Batch], tuple[jax.Array, jax.Array, jax.Array, tuple]]:
    """Jitted (params, router_bias, batch of L+1 tokens) -> sums: nll in nats, correct, targets; and expert loads.

    Of the weights, in 16 or 32 bits whatever training does. Layers are not pipelined: `pipe` serves as it does at the ends
    of a pipeline.
    """
    graph = abstract_model(config, unquantised(training_recipe(config, layout)), layout.ends).graph

    def eval_step(params: nnx.State, router_bias: nnx.State, batch: Batch):
        count = target_counts(batch["segments"], 0)[0]
        share = Share(LossWeights(0.0, 0.0), [count], batch["tokens"].shape[0])

        def of_replica(params, rows):
            model = nnx.merge(graph, params, router_bias)
            model.mtp = nnx.List([])  # evaluation is of the next token only
            return objective(model, rows, share)[1]

        metrics = over_replicas(of_replica, layout.replicas)(params, batch)
        return metrics.cross_entropy * count, metrics.accuracy * count, count, metrics.load

    state = jax.tree.map(lambda a: a.sharding, abstract_state(config, layout))
    arguments = (state.params, state.router_bias, layout.batch_sharding)
    return layout.jit(eval_step, arguments, layout.replicated)
