"""Bytes of the training state on a device: by arithmetic for ranking meshes, and counted on a state's arrays."""

import functools
import math
from dataclasses import replace
from typing import Any

import jax
from flax import nnx

from dsv3_jax.config import Config, OptimConfig, PrecisionConfig
from dsv3_jax.model.counts import count_parameters
from dsv3_jax.model.parameters import DENSE_FFN, constant
from dsv3_jax.optim.registry import make_optimizer
from dsv3_jax.state.train_state import TrainState

parameter_counts = functools.cache(count_parameters)


def parameters_per_device(config: Config, sizes: dict[str, int]) -> float:
    """Parameters stored on a device, MTP modules included, on a mesh of these axis `sizes`: all axes but `data` divide them."""
    counts = parameter_counts(config.model)
    return (counts.total + counts.mtp) / (sizes["fsdp"] * sizes["expert"] * sizes["pipe"] * sizes["tensor"])


@functools.cache
def _optimizer_bytes(optim: OptimConfig, precision: PrecisionConfig) -> int:
    """Bytes of optimizer state per parameter, by the optimizer's abstract state for one large matrix."""
    if precision.recipe == "auto":  # resolved later; before, moments count as float32
        precision = replace(precision, recipe="bf16")
    size = 1024
    matrix = jax.eval_shape(lambda: constant(0.0, DENSE_FFN, embed=size, ffn=size))
    state = jax.eval_shape(make_optimizer(optim, precision).init, nnx.State({"matrix": matrix}))
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(state)) // size**2


def state_bytes_per_device(config: Config, sizes: dict[str, int]) -> float:
    """Bytes of a device's part of the training state on a mesh of these axis `sizes`.

    Counts master weights, the optimizer's state, the moving average, and the error feedback of compressed gradients (an upper
    bound: some parameters are never compressed). Small state, such as the router's bias, is left out.
    """
    optimizer = _optimizer_bytes(config.optim, config.precision)
    average = 4 if config.optim.ema_decay else 0
    compressed = config.parallel.compress and sizes["data"] > 1
    feedback = 4 + 4 / sizes["data"] if compressed else 0  # the replica's own, and its share of the mean's
    return parameters_per_device(config, sizes) * (4 + optimizer + average + feedback)


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
