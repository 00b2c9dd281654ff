"""The objective cut for a pipeline: embedding and dense layers, MoE layers, head and MTP modules."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3_jax.config import Config
from dsv3_jax.data.batch import Batch
from dsv3_jax.model.layout import Layout
from dsv3_jax.model.parameters import RouterBias
from dsv3_jax.parallel.pipeline import Pipeline, cut_layers
from dsv3_jax.parallel.schedule import Schedule, make_schedule
from dsv3_jax.precision.recipes import Recipe
from dsv3_jax.state.train_state import make_model
from dsv3_jax.training.objective import Metrics, Share, head_objective, sum_traffic


def microbatches(batch: Batch, count: int, layout: Layout) -> Batch:
    """A batch of B rows as [count, B / count, ...], each microbatch spread over all devices, so that no row moves."""
    shards = layout.shards("batch")

    def split(a):
        a = a.reshape(shards, count, -1, *a.shape[1:]).swapaxes(0, 1)
        return layout.constrain(a.reshape(count, -1, *a.shape[3:]), None, "batch", None)

    return jax.tree.map(split, batch)


def schedule_of(config: Config, stages: int) -> Schedule:
    """The configuration's schedule for a pipeline of this many stages."""
    return make_schedule(config.parallel.pipe_schedule, stages, config.parallel.pipe_chunks, config.train.grad_accum_steps)


def _without_layers(state: nnx.State) -> nnx.State:
    """The variables outside the pipeline's stages."""
    return nnx.State({name: value for name, value in state.raw_mapping.items() if name != "moe_blocks"})


def pipelined_gradients(config: Config, recipe: Recipe, layout: Layout, router_bias: nnx.State, share: Share) -> Callable:
    """(params, some rows of the batch) -> gradients, metrics; `train.grad_accum_steps` microbatches go through the pipeline."""
    model = nnx.eval_shape(lambda: make_model(config, recipe, nnx.Rngs(0), layout))
    block_graph, _, _ = nnx.split(model.moe_blocks, nnx.Param, RouterBias)  # `rules.check` made sure that there are some
    model.moe_blocks = None
    outer_graph, _, _ = nnx.split(model, nnx.Param, RouterBias)
    outer_bias, depth = _without_layers(router_bias), config.model.num_nextn_predict_layers
    layer_bias = router_bias.get("moe_blocks", nnx.State({}))  # a router may keep none

    def first(outer, microbatch: Batch):
        return nnx.merge(outer_graph, outer, outer_bias).first(*microbatch.inputs(depth))

    def stage(layers, bias, x_BLD, segment_BX, live_N):
        segment_BL = segment_BX[:, : x_BLD.shape[1]]
        blocks: Any = nnx.merge(block_graph, layers, bias)
        x_BLD, stats = model.run(blocks, x_BLD, segment_BL, live_N)
        stats = jax.tree.map(lambda a: jnp.where(live_N.reshape(-1, *[1] * (a.ndim - 1)), a, 0), stats)
        balance = stats.balance_loss.sum() * share.weights.balance * (segment_BX.shape[0] / share.sequences)
        return (x_BLD, balance), stats

    def last(outer, x_BLD, microbatch: Batch):
        outside = nnx.merge(outer_graph, outer, outer_bias)
        return head_objective(outside, outside.norm(x_BLD), [], microbatch, share)

    pieces = cut_layers(config.model.num_moe_layers, layout.stages, config.parallel.pipe_chunks)
    pipeline = Pipeline(layout, schedule_of(config, layout.stages), pieces, first, stage, last)

    def gradients(params: nnx.State, batch: Batch) -> tuple[nnx.State, Metrics]:
        parts = microbatches(batch, config.train.grad_accum_steps, layout)
        d_outer, d_layers, metrics, stats = pipeline.gradients(
            _without_layers(params), params["moe_blocks"], layer_bias, model.dtype, parts
        )
        balance = stats.balance_loss.sum() * (parts.tokens.shape[1] / share.sequences)
        traffic = sum_traffic([stats])
        metrics = metrics._replace(
            loss=metrics.loss + share.weights.balance * balance,
            balance_loss=metrics.balance_loss + balance,
            traffic=jax.tree.map(jnp.add, metrics.traffic, traffic),
            load=(stats.load_E, *metrics.load),
        )
        return nnx.State(d_outer.raw_mapping | {"moe_blocks": d_layers.raw_mapping}), metrics

    return gradients
