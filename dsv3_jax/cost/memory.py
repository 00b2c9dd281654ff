"""Bytes of the training state on a device: one count, from the state's own abstract arrays, on a mesh or for ranking meshes."""

import functools
import math
from collections import Counter
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import AbstractMesh

from dsv3_jax.config import Config, DataConfig, ModelConfig, OptimConfig, PrecisionConfig
from dsv3_jax.exchange.exchange import Exchange
from dsv3_jax.model.counts import count_parameters
from dsv3_jax.parallel.mesh import AXES
from dsv3_jax.parallel.on_mesh import OnMesh
from dsv3_jax.parallel.rules import is_variable, stored_parts
from dsv3_jax.state.train_state import TrainState, init_state

parameter_counts = functools.cache(count_parameters)


def parameters_per_device(config: Config, sizes: dict[str, int]) -> float:
    """Parameters stored on a device, MTP modules included, on a mesh of these axis `sizes`: all axes but `data` divide them."""
    counts = parameter_counts(config.model)
    return (counts.total + counts.mtp) / (sizes["fsdp"] * sizes["expert"] * sizes["pipe"] * sizes["tensor"])


def abstract_layout(sizes: dict[str, int]) -> OnMesh:
    """The layout on a mesh of these axis `sizes`, as far as it says where arrays are stored: no device is asked for."""
    return OnMesh(AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES))  # type: ignore[arg-type]


class _Stored(NamedTuple):
    """What a state holds, as abstract arrays on no mesh."""

    params: nnx.State
    bytes_by_array: dict[tuple[tuple[str | None, ...], tuple[int, ...]], int]  # of all arrays of these logical axes and shape
    everywhere: int  # bytes of what every device has


@functools.cache
def _stored(model: ModelConfig, optim: OptimConfig, precision: PrecisionConfig) -> _Stored:
    if precision.recipe == "auto":  # resolved later; before, moments count as float32
        precision = PrecisionConfig(recipe="bf16")
    config = Config(model=model, optim=optim, precision=precision, data=DataConfig(seq_len=1))
    state = jax.eval_shape(functools.partial(init_state, config))
    by_array: Counter = Counter()
    everywhere = 0
    for leaf in jax.tree.leaves(state, is_leaf=is_variable):
        array = leaf.get_value() if is_variable(leaf) else leaf
        size = math.prod(array.shape) * array.dtype.itemsize
        if is_variable(leaf):
            by_array[leaf.get_metadata("logical_axes"), array.shape] += size
        else:
            everywhere += size
    return _Stored(state.params, dict(by_array), everywhere)


@functools.cache
def _bytes_on(
    model: ModelConfig, optim: OptimConfig, precision: PrecisionConfig, compress: Any, mesh: tuple[tuple[str, int], ...]
) -> int:
    stored, sizes = _stored(model, optim, precision), dict(mesh)
    arrays = sum(size // stored_parts(*array, sizes) for array, size in stored.bytes_by_array.items())
    return stored.everywhere + arrays + Exchange(abstract_layout(sizes), compress).residual_bytes(stored.params)


def state_bytes_per_device(config: Config, sizes: dict[str, int]) -> int:
    """Bytes of a device's part of the training state on a mesh of these axis `sizes`: those of `bytes_by_part`, added up.

    Counts the state's own arrays without tracing it for each mesh, of which ranking asks for thousands. The mesh is one that
    `rules.check` passes. With `precision.recipe=auto`, moments that the recipe would store count as float32.
    """
    return _bytes_on(config.model, config.optim, config.precision, config.parallel.compress, tuple(sizes.items()))


def bytes_by_part(state: TrainState) -> dict[str, int]:
    """Bytes on one device of each part of a state, which may be abstract; the keys are those of plan.json."""

    def shard_bytes(tree: Any) -> int:
        return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))

    return {
        "parameters": shard_bytes(state.params),
        "moments": shard_bytes(state.opt_state),
        "moving average": shard_bytes(state.ema),
        "owed to the exchange": shard_bytes(state.residuals),
        "other state": shard_bytes((state.step, state.router_bias, state.controller)),
    }
