"""Gradients by a pipeline: runs a `Schedule`'s table, tick by tick, and writes the backward pass out.

Stages are an axis of a `vmap` whose elements live along `pipe`. The stored layers are sharded along `pipe` like everything
else (ZeRO-3); a step begins by exchanging that for complete layers on their stages, which lets the number of layers, and their
order among chunks, be any. Backward, a stage runs its piece again from the input it kept; between forward and backward it
holds as many inputs as the schedule has slots, however many microbatches there are. Embedding, dense layers, head and MTP
modules are outside, where all devices share the work (see `rules.OUTSIDE_PIPELINE`): no stage has more to do than others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from dsv3_jax.data.batch import Batch
from dsv3_jax.model.layout import Layout
from dsv3_jax.model.parameters import is_float32
from dsv3_jax.parallel.collectives import all_gather, all_to_all, reduce_scatter
from dsv3_jax.parallel.layout import without_pipe
from dsv3_jax.parallel.rules import is_variable
from dsv3_jax.parallel.schedule import Schedule

Tree = Any
_PIPE = ("pipe",)


class Pieces(NamedTuple):
    """Which stage and chunk run which layers.

    A piece with fewer layers than most is filled up with layers that are not live and pass their input on.
    """

    layer: np.ndarray  # i32[stages, chunks, most layers of a piece]
    live: np.ndarray  # bool of that shape
    position: tuple[np.ndarray, np.ndarray]  # of each layer: its stage, and its index among the stage's chunks * most


def cut_layers(layers: int, stages: int, chunks: int) -> Pieces:
    """Layers in order over pieces in order, as evenly as they go."""
    pieces = np.array_split(np.arange(layers), stages * chunks)
    most = len(pieces[0])
    layer, live = np.zeros((stages, chunks, most), np.int32), np.zeros((stages, chunks, most), bool)
    stage_of, index_of = np.zeros(layers, np.int32), np.zeros(layers, np.int32)
    for number, piece in enumerate(pieces):
        chunk, stage = divmod(number, stages)
        layer[stage, chunk], live[stage, chunk, : len(piece)] = np.resize(piece, most), True
        stage_of[piece], index_of[piece] = stage, chunk * most + np.arange(len(piece))
    return Pieces(layer, live, (stage_of, index_of))


def _pipe_axis(spec: P) -> int | None:
    return next((i for i, entry in enumerate(spec) if entry and "pipe" in entry), None)


def to_stages(layout: Layout, pieces: Pieces, variable: nnx.Variable, dtype: jnp.dtype) -> nnx.Variable:
    """Stacked layers [N, ...], stored, as [stages, chunks, most, ...] on their stages; matrices in `dtype`."""
    w = variable.get_value()
    if jnp.issubdtype(w.dtype, jnp.floating) and not is_float32(variable):
        w = w.astype(dtype)
    stored = layout.stored_spec(variable)
    axis = _pipe_axis(stored)
    stages, chunks, most = pieces.layer.shape

    def local(w):
        w = w[pieces.layer.reshape(stages, -1)]  # [stages, chunks * most, ...]
        w = lax.dynamic_index_in_dim(w, lax.axis_index("pipe"), 0) if axis is None else all_to_all(w, _PIPE, 0, axis + 1)
        return w.reshape(1, chunks, most, *w.shape[2:])

    out = P("pipe", None, None, *without_pipe(stored)[1:])
    return variable.replace(layout.on_each_device(local, (stored,), out)(w))


def from_stages(layout: Layout, pieces: Pieces, stacked: nnx.Variable, gradient: nnx.Variable) -> nnx.Variable:
    """The other way, for gradients: [stages, chunks, most, ...] as `stacked`, [N, ...], is stored."""
    stored = layout.stored_spec(stacked)
    axis = _pipe_axis(stored)

    def local(g):
        g = g.reshape(1, -1, *g.shape[3:])
        g = all_gather(g, _PIPE, 0) if axis is None else all_to_all(g, _PIPE, axis + 1, 0)
        return g[pieces.position]

    spec = P("pipe", None, None, *without_pipe(stored)[1:])
    return stacked.replace(layout.on_each_device(local, (spec,), stored)(gradient))


@dataclass(frozen=True)
class Pipeline:
    """A model cut for a pipeline, and the schedule that runs it.

    `outer` are the parameters outside of the stages: those of embedding, dense layers, head and MTP modules.

    `first(outer, microbatch)` -> x. `stage(layers, bias, x, segments, live)` -> (y, loss), statistics. `last(outer, x,
    microbatch)` -> loss, metrics. Losses add up; arrays of `microbatches` are [count, rows, ...].
    """

    layout: Layout
    schedule: Schedule
    pieces: Pieces
    first: Callable
    stage: Callable
    last: Callable

    def gradients(self, outer: Tree, layers: Tree, biases: Tree, dtype: jnp.dtype, microbatches: Batch) -> tuple:
        """(gradients of `outer`, of `layers`, sum of `last`'s metrics, sum of the stages' statistics [N, ...])."""
        staged = jax.tree.map(lambda v: to_stages(self.layout, self.pieces, v, dtype), layers, is_leaf=is_variable)
        bias = jax.tree.map(lambda v: to_stages(self.layout, self.pieces, v, dtype), biases, is_leaf=is_variable)
        run = _Run(self, outer, staged, bias, microbatches)
        carry = run.start()
        for begin, end, any_forward, any_backward in self.schedule.phases():
            rows = jax.tree.map(lambda a, b=begin, e=end: jnp.asarray(a[b:e]), _rows(self.schedule))
            carry, _ = lax.scan(
                lambda c, row, f=any_forward, b=any_backward: (run.tick(c, row, f, b), None), carry, rows
            )  # fmt: skip
        gradients = jax.tree.map(
            lambda v, g: from_stages(self.layout, self.pieces, v, g), layers, carry.layer_gradients, is_leaf=is_variable
        )
        statistics = jax.tree.map(self._unstage, carry.statistics)
        return carry.outer_gradients, gradients, carry.metrics, statistics

    def _unstage(self, s):
        """[stages, chunks, most, ...] -> [N, ...], on every device."""
        s = lax.with_sharding_constraint(s, self.layout.replicated)
        return s.reshape(s.shape[0], -1, *s.shape[3:])[self.pieces.position]


class _Row(NamedTuple):
    """A tick's row of the table: i32[stages] each, and i32[] for what happens outside of the stages."""

    forward: Any
    forward_chunk: Any
    forward_slot: Any
    backward: Any
    backward_chunk: Any
    backward_slot: Any
    entering: Any
    leaving: Any
    returning: Any
    done: Any


def _rows(s: Schedule) -> _Row:
    # an idle stage puts its input into a buffer that nobody reads, the one after the last
    slots = [np.where(m < 0, s.slots, slot) for m, slot in ((s.forward, s.forward_slot), (s.backward, s.backward_slot))]
    chunks = [np.maximum(c, 0) for c in (s.forward_chunk, s.backward_chunk)]
    return _Row(
        s.forward, chunks[0], slots[0], s.backward, chunks[1], slots[1], s.entering, s.leaving, s.returning, s.done
    )  # fmt: skip


def _chunk(tree: Tree, chunk) -> Tree:
    """[chunks, ...] -> [...], for what is small."""
    return jax.tree.map(lambda a: a[chunk], tree)


def _accumulated(totals: Tree, gradients: Tree) -> Tree:
    """Their sum, in the totals' dtype."""
    return jax.tree.map(lambda total, d: total + d.astype(total.dtype), totals, gradients)


class _Carry(NamedTuple):
    x: jax.Array  # [stages, rows, L, D]: what each stage takes next, forward
    dy: jax.Array  # the same, backward
    kept: jax.Array  # [stages, slots + 1, rows, L, D]: inputs kept for the backward pass
    turning: jax.Array  # [slots, rows, L, D]: gradients of outputs, outside of the stages
    layer_gradients: Tree
    outer_gradients: Tree
    metrics: Tree
    statistics: Tree  # [stages, chunks, most, ...]


class _Run:
    """One step's pipeline, once its weights are on their stages."""

    def __init__(self, pipeline: Pipeline, outer: Tree, staged: Tree, bias: Tree, microbatches: Tree):
        self.pipeline, self.layout, self.schedule = pipeline, pipeline.layout, pipeline.schedule
        self.outer, self.staged, self.bias, self.microbatches = outer, staged, bias, microbatches
        self.live = jnp.asarray(pipeline.pieces.live)
        self.stages = self.schedule.stages

    # --- moving activations -------------------------------------------------------------------------------------------

    def _spec(self, outer: bool, *leading: str | None) -> P:
        layout = self.layout.outside_pipeline if outer else self.layout
        return P(*leading, *layout.spec("batch", "sequence", None))

    def _shift(self, x, by: int):
        """Every stage's x to the next stage (by=1), or the one before (by=-1), round the ring."""
        ring = [(i, (i + by) % self.stages) for i in range(self.stages)]
        spec = self._spec(False, "pipe")
        return self.layout.on_each_device(lambda x: lax.ppermute(x, "pipe", ring), (spec,), spec)(x)

    def _to_outer(self, x, stage: int):
        """One stage's [rows, L, D], handed out over all stages' devices along L."""

        def local(x):
            x = jnp.where(lax.axis_index("pipe") == stage, x[0], 0)
            return reduce_scatter(x, _PIPE, 1)

        return self.layout.on_each_device(local, (self._spec(False, "pipe"),), self._spec(True))(x)

    def _from_outer(self, x, x_outer, stage: int):
        """x with one stage's part replaced by what comes from outside."""

        def local(x, x_outer):
            entering = all_gather(x_outer, _PIPE, 1)[None]
            return jnp.where(lax.axis_index("pipe") == stage, entering, x)

        spec = self._spec(False, "pipe")
        return self.layout.on_each_device(local, (spec, self._spec(True)), spec)(x, x_outer)

    # --- per stage (inside `vmap`): dynamic indices stay on the device -------------------------------------------------

    def _pick(self, tree: Tree, index, specs: Tree):
        """a[index] of every leaf; `specs` are those of a[index]."""
        flat, treedef = jax.tree.flatten(tree)
        specs = tuple(jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, P)))

        def local(index, *leaves):
            return tuple(lax.dynamic_index_in_dim(a, index, keepdims=False) for a in leaves)

        inputs = (P(), *(P(None, *s) for s in specs))
        return jax.tree.unflatten(treedef, self.layout.on_each_device(local, inputs, specs)(index, *flat))

    def _add_at(self, tree: Tree, index, update: Tree, specs: Tree):
        """tree with `update` added at `index` of every leaf."""
        flat, treedef = jax.tree.flatten(tree)
        specs = tuple(jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, P)))
        n = len(flat)

        def local(index, *leaves):
            return tuple(a.at[index].add(u.astype(a.dtype)) for a, u in zip(leaves[:n], leaves[n:], strict=True))

        stacked = tuple(P(None, *s) for s in specs)
        out = self.layout.on_each_device(local, (P(), *stacked, *specs), stacked)(index, *flat, *jax.tree.leaves(update))
        return jax.tree.unflatten(treedef, out)

    def _keep(self, kept, x, slot):
        spec = self._spec(False)

        def local(kept, x, slot):
            return lax.dynamic_update_index_in_dim(kept, x, slot, 0)

        return self.layout.on_each_device(local, (P(None, *spec), spec, P()), P(None, *spec))(kept, x, slot)

    @property
    def _layer_specs(self) -> Tree:
        """Specs of one stage's piece, [most, ...]; its arrays are [stages, chunks, most, ...]."""

        def of(v):
            return P(*without_pipe(self.layout.stored_spec(v))[2:])

        return jax.tree.map(of, self.staged, is_leaf=is_variable)

    def _segments(self, microbatch):
        spec = self.layout.spec("batch", None)
        return self._pick(self.microbatches.segments, jnp.maximum(microbatch, 0), spec)

    # --- the schedule -------------------------------------------------------------------------------------------------

    def start(self) -> _Carry:
        """Everything empty."""
        microbatch = jax.tree.map(lambda a: a[0], self.microbatches)
        x = jax.eval_shape(self.pipeline.first, self.outer, microbatch)
        s, layout = self.schedule, self.layout

        def zeros(spec: P, *shape: int):
            return lax.with_sharding_constraint(jnp.zeros(shape, x.dtype), layout.sharding(spec))

        turning = 1 if s.name == "1f1b" else s.microbatches
        f32 = jnp.float32
        layer_gradients = jax.tree.map(lambda a: jnp.zeros(a.shape, f32), self.staged)
        outer_gradients = jax.tree.map(lambda a: jnp.zeros(a.shape, f32), self.outer)
        _, metrics = jax.eval_shape(self.pipeline.last, self.outer, x, microbatch)
        piece, bias, live = jax.tree.map(lambda a: a[0, 0], (self.staged, self.bias, self.live))
        segments = self.microbatches.segments[0]
        _, statistics = jax.eval_shape(self.pipeline.stage, piece, bias, x, segments, live)
        statistics = jax.tree.map(lambda a: jnp.zeros((self.stages, s.chunks, *a.shape), a.dtype), statistics)
        return _Carry(
            zeros(self._spec(False, "pipe"), self.stages, *x.shape),
            zeros(self._spec(False, "pipe"), self.stages, *x.shape),
            zeros(self._spec(False, "pipe", None), self.stages, s.slots + 1, *x.shape),
            zeros(self._spec(True, None), turning, *x.shape),
            layer_gradients,
            outer_gradients,
            jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), metrics),
            statistics,
        )

    def tick(self, carry: _Carry, row: _Row, any_forward: bool, any_backward: bool) -> _Carry:
        if any_forward:
            carry = self._forward(self._enter(carry, row), row)
            carry = self._turn(carry, row)
            carry = carry._replace(x=self._shift(carry.x, 1))
        if any_backward:
            carry = self._backward(self._return(carry, row), row)
            carry = self._finish(carry, row)
            carry = carry._replace(dy=self._shift(carry.dy, -1))
        return carry

    def _microbatch(self, number) -> Tree:
        return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, number, keepdims=False), self.microbatches)

    def _enter(self, carry: _Carry, row: _Row) -> _Carry:
        def enter(x):
            return self._from_outer(x, self.pipeline.first(self.outer, self._microbatch(row.entering)), 0)

        return carry._replace(x=lax.cond(row.entering >= 0, enter, lambda x: x, carry.x))

    def _forward(self, carry: _Carry, row: _Row) -> _Carry:
        specs = self._layer_specs

        def stage(layers, bias, live, kept, statistics, x, microbatch, chunk, slot):
            kept = self._keep(kept, x, slot)
            piece = self._pick(layers, chunk, specs)
            (y, _), new = self.pipeline.stage(piece, _chunk(bias, chunk), x, self._segments(microbatch), live[chunk])
            new = jax.tree.map(lambda a: jnp.where(microbatch >= 0, a, 0), new)
            statistics = jax.tree.map(lambda total, a: total.at[chunk].add(a), statistics, new)
            return kept, statistics, y

        kept, statistics, y = jax.vmap(stage, spmd_axis_name="pipe")(
            self.staged, self.bias, self.live, carry.kept, carry.statistics, carry.x,
            row.forward, row.forward_chunk, row.forward_slot,
        )  # fmt: skip
        return carry._replace(x=y, kept=kept, statistics=statistics)

    def _turn(self, carry: _Carry, row: _Row) -> _Carry:
        """The head, on what leaves the last piece; its gradient waits in `turning`."""

        def turn(state):
            outer_gradients, metrics, turning = state
            y = self._to_outer(carry.x, self.stages - 1)
            gradient = jax.grad(self.pipeline.last, argnums=(0, 1), has_aux=True)
            (d_outer, dy), new = gradient(self.outer, y, self._microbatch(row.leaving))
            slot = row.leaving % turning.shape[0]
            return (
                _accumulated(outer_gradients, d_outer),
                jax.tree.map(jnp.add, metrics, new),
                lax.dynamic_update_index_in_dim(turning, dy, slot, 0),
            )

        state = (carry.outer_gradients, carry.metrics, carry.turning)
        outer_gradients, metrics, turning = lax.cond(row.leaving >= 0, turn, lambda s: s, state)
        return carry._replace(outer_gradients=outer_gradients, metrics=metrics, turning=turning)

    def _return(self, carry: _Carry, row: _Row) -> _Carry:
        def give_back(dy):
            slot = row.returning % carry.turning.shape[0]
            return self._from_outer(dy, lax.dynamic_index_in_dim(carry.turning, slot, keepdims=False), self.stages - 1)

        return carry._replace(dy=lax.cond(row.returning >= 0, give_back, lambda dy: dy, carry.dy))

    def _backward(self, carry: _Carry, row: _Row) -> _Carry:
        specs = self._layer_specs

        def stage(layers, bias, live, kept, gradients, dy, microbatch, chunk, slot):
            x = self._pick(kept, slot, self._spec(False))
            piece, segments = self._pick(layers, chunk, specs), self._segments(microbatch)

            def run(piece, x):
                return self.pipeline.stage(piece, _chunk(bias, chunk), x, segments, live[chunk])

            _, vjp, _ = jax.vjp(run, piece, x, has_aux=True)
            d_piece, dx = vjp((dy, jnp.float32(1)))
            d_piece = jax.tree.map(lambda d: jnp.where(microbatch >= 0, d, 0), d_piece)
            return self._add_at(gradients, chunk, d_piece, specs), dx

        gradients, dx = jax.vmap(stage, spmd_axis_name="pipe")(
            self.staged, self.bias, self.live, carry.kept, carry.layer_gradients, carry.dy,
            row.backward, row.backward_chunk, row.backward_slot,
        )  # fmt: skip
        return carry._replace(dy=dx, layer_gradients=gradients)

    def _finish(self, carry: _Carry, row: _Row) -> _Carry:
        """Back through embedding and dense layers."""

        def finish(outer_gradients):
            dx = self._to_outer(carry.dy, 0)
            microbatch = self._microbatch(row.done)
            _, vjp = jax.vjp(lambda outer: self.pipeline.first(outer, microbatch), self.outer)
            return _accumulated(outer_gradients, vjp(dx)[0])

        outer_gradients = lax.cond(row.done >= 0, finish, lambda g: g, carry.outer_gradients)
        return carry._replace(outer_gradients=outer_gradients)
