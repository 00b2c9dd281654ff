"""Which numbers of workers a configuration can train on, and on which mesh: for runs that lose hosts and get them back.

The global batch, the microbatches and the model stay as they are; only the mesh changes. A mesh is feasible if model and batch
can be divided over it and the state fits (`parallel.max_state_gib`). Of all feasible meshes over the devices that are left,
the closest to the configuration is taken: `tensor` stays if it can, then `pipe`, `expert` and `fsdp`; `data` takes the rest.
"""

import itertools
import math
from dataclasses import replace

from dsv3_jax.config import Config
from dsv3_jax.cost.division import meshes_that_divide, rows_of
from dsv3_jax.cost.memory import state_bytes_per_device
from dsv3_jax.errors import UserError
from dsv3_jax.parallel.mesh import axis_sizes
from dsv3_jax.parallel.rules import check

_MOST_MESHES = 100_000  # that are tried for a list of numbers of workers
_MOST_IMPORTANT_FIRST = ("tensor", "pipe", "expert", "fsdp", "data")  # the order in which axes keep their size


def _is_feasible(config: Config, sizes: dict[str, int]) -> bool:
    try:
        check(config, sizes)
    except UserError:
        return False
    limit = config.parallel.max_state_gib
    return limit is None or state_bytes_per_device(config, sizes) <= limit * 2**30


def _configured_mesh(config: Config, devices: int) -> dict[str, int] | None:
    """The configuration's own mesh, if it is feasible and covers exactly `devices` devices."""
    try:
        sizes = axis_sizes(config.parallel, devices)
    except UserError:
        return None
    return sizes if math.prod(sizes.values()) == devices and _is_feasible(config, sizes) else None


def mesh_for_devices(config: Config, devices: int) -> dict[str, int] | None:
    """Axis sizes of the feasible mesh over exactly `devices` devices that is closest to the configuration, or None."""
    configured = _configured_mesh(config, devices)
    if configured is not None:
        return configured
    wanted = {axis: size for axis in _MOST_IMPORTANT_FIRST if (size := getattr(config.parallel, axis)) != -1}

    def change(sizes: dict[str, int]) -> tuple[float, ...]:
        return tuple(abs(math.log(sizes[axis] / size)) for axis, size in wanted.items())

    return min(
        (sizes for sizes in meshes_that_divide(config, devices) if _is_feasible(config, sizes)), key=change, default=None
    )


def feasible_worker_counts(config: Config, devices_per_worker: int, counts: range) -> dict[int, dict[str, int]]:
    """{number of workers: axis sizes of its mesh} of the numbers in `counts` that have a feasible mesh.

    Raises `UserError` if there are more meshes to try than in seconds.
    """
    largest = rows_of(config) * config.model.num_attention_heads // devices_per_worker  # every mesh divides that product
    within = range(counts.start, min(counts.stop, largest + 1))
    meshes = itertools.chain.from_iterable(meshes_that_divide(config, count * devices_per_worker) for count in within)
    if sum(1 for _ in itertools.islice(meshes, _MOST_MESHES + 1)) > _MOST_MESHES:
        raise UserError(
            f"{counts.start} to {counts.stop - 1} workers of {devices_per_worker} devices have more than {_MOST_MESHES:,} "
            "meshes to choose from; ask for fewer workers"
        )
    found = {count: mesh_for_devices(config, count * devices_per_worker) for count in within}
    return {count: sizes for count, sizes in found.items() if sizes is not None}


def largest_feasible_count(config: Config, devices_per_worker: int, workers: int) -> int:
    """The largest number of workers up to `workers` that has a feasible mesh; 0 if there is none."""
    return next((n for n in range(workers, 0, -1) if mesh_for_devices(config, n * devices_per_worker)), 0)


def fit_to_devices(config: Config, devices: int) -> Config:
    """The configuration with its mesh for exactly `devices` devices. Raises `UserError` if there is none."""
    sizes = mesh_for_devices(config, devices)
    if sizes is None:
        feasible = [n for n in range(1, 4 * devices + 1) if mesh_for_devices(config, n)]
        near = [n for n in feasible if n < devices][-2:] + [n for n in feasible if n > devices][:1]
        raise UserError(
            f"no mesh over {devices} devices divides data.batch_size={config.data.batch_size} and the model; nearest numbers "
            f"that do: {', '.join(map(str, near)) or 'none'}"
        )
    return replace(config, parallel=replace(config.parallel, **sizes))
