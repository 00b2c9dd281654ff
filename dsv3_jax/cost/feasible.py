"""Which numbers of workers a configuration can train on, and on which mesh: for runs that lose hosts and get them back.

The global batch, the microbatches and the model stay as they are; only the mesh changes. Of all meshes over the devices that
are left, the one is taken that changes what tells least: `tensor` stays if it can, then `pipe`, `expert` and `fsdp`, and
`data` takes the rest. `parallel.max_state_gib` rules out meshes on which the state would not fit.
"""

import functools
import math
from dataclasses import replace

from dsv3_jax.config import Config, ModelConfig
from dsv3_jax.errors import UserError
from dsv3_jax.model.counts import Counts, count_parameters
from dsv3_jax.parallel.mesh import axis_sizes, meshes
from dsv3_jax.parallel.rules import check
from dsv3_jax.precision.recipes import RECIPES

_KEPT = ("tensor", "pipe", "expert", "fsdp", "data")  # first what is kept if it can be


@functools.cache
def counts_of(model: ModelConfig) -> Counts:
    return count_parameters(model)


def stored_parameters(config: Config, sizes: dict[str, int]) -> float:
    """How many of them a device keeps."""
    counts = counts_of(config.model)
    return (counts.total + counts.mtp) / (sizes["fsdp"] * sizes["expert"] * sizes["pipe"] * sizes["tensor"])


def state_bytes(config: Config, sizes: dict[str, int]) -> float:
    """Of a device's weights, in float32, moments, and what it owes to an exchange of gradients."""
    recipe = config.precision.recipe
    of_recipe = RECIPES[recipe].moments if recipe in RECIPES else "float32"  # `auto` is resolved later
    short = config.optim.moment_dtype == "bfloat16" or of_recipe == "bfloat16"
    owed = 4 + 4 / sizes["data"] if config.parallel.compress and sizes["data"] > 1 else 0
    return stored_parameters(config, sizes) * (4 + 2 * (2 if short else 4) + owed)


def _legal(config: Config, sizes: dict[str, int]) -> bool:
    try:
        check(config, sizes)
    except UserError:
        return False
    limit = config.parallel.max_state_gib
    return limit is None or state_bytes(config, sizes) <= limit * 2**30


def _as_asked(config: Config, devices: int) -> dict[str, int] | None:
    """The configuration's own mesh, where it covers exactly `devices` devices."""
    try:
        sizes = axis_sizes(config.parallel, devices)
    except UserError:
        return None
    return sizes if math.prod(sizes.values()) == devices and _legal(config, sizes) else None


def mesh_over(config: Config, devices: int) -> dict[str, int] | None:
    """Sizes of the axes over exactly `devices` devices, or None if no mesh over them divides model and batch."""
    asked = _as_asked(config, devices)
    if asked is not None:
        return asked
    wanted = {axis: size for axis in _KEPT if (size := getattr(config.parallel, axis)) != -1}

    def change(sizes: dict[str, int]) -> tuple[float, ...]:
        return tuple(abs(math.log(sizes[axis] / size)) for axis, size in wanted.items())

    return min((sizes for sizes in meshes(devices) if _legal(config, sizes)), key=change, default=None)


def worlds(config: Config, devices_per_worker: int, workers: range) -> dict[int, dict[str, int]]:
    """{number of workers: mesh}, of those numbers in `workers` that are legal."""
    found = {count: mesh_over(config, count * devices_per_worker) for count in workers}
    return {count: sizes for count, sizes in found.items() if sizes is not None}


def largest_world(config: Config, devices_per_worker: int, workers: int) -> int:
    """The largest legal number of workers, `workers` at most; 0 if there is none."""
    return next((n for n in range(workers, 0, -1) if mesh_over(config, n * devices_per_worker)), 0)


def on_mesh(config: Config, devices: int) -> Config:
    """The configuration with the mesh that it has over exactly `devices` devices. Raises `UserError` if there is none."""
    sizes = mesh_over(config, devices)
    if sizes is None:
        legal = [n for n in range(1, 4 * devices + 1) if mesh_over(config, n)]
        near = [n for n in legal if n < devices][-2:] + [n for n in legal if n > devices][:1]
        raise UserError(
            f"no mesh over {devices} devices divides data.batch_size={config.data.batch_size} and the model; nearest numbers "
            f"that do: {', '.join(map(str, near)) or 'none'}"
        )
    return replace(config, parallel=replace(config.parallel, **sizes))
