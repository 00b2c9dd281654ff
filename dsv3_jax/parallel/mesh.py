"""The device mesh: axis sizes from the configuration, device order from the hardware.

Axes run from slow to fast links (data, pipe, fsdp, expert, tensor), so the order of devices must put neighbours along
`tensor` on the fastest links and neighbours along `data` on the slowest: slices and hosts first, devices inside them last.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import fields

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from dsv3_jax.checks import choices, divisors
from dsv3_jax.config import ParallelConfig
from dsv3_jax.errors import UserError

AXES = ("data", "pipe", "fsdp", "expert", "tensor")


def axis_sizes(config: ParallelConfig, devices: int) -> dict[str, int]:
    """Sizes of the axes on `devices` devices, with the axis of -1 filled up.

    Raises `UserError` if the axes do not multiply to the number of devices, or to a divisor that leaves some unused.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    fill = [axis for axis, size in sizes.items() if size == -1]
    given = math.prod(size for size in sizes.values() if size != -1)
    product = " * ".join(f"{axis}={size}" for axis, size in sizes.items() if size not in (1, -1)) or "1"
    if fill:
        if devices % given:
            raise UserError(
                f"parallel.{fill[0]}=-1: the other axes ({product} = {given}) do not divide {devices} devices; "
                f"make their product one of {choices(devices)}"
            )
        sizes[fill[0]] = devices // given
    elif given > devices:
        raise UserError(
            f"parallel: {product} = {given} devices, but there are {devices}; lower an axis, or set one to -1 to fill up "
            f"(on a CPU, JAX_NUM_CPU_DEVICES={given} makes virtual devices)"
        )
    elif given < devices and jax.process_count() > 1:
        raise UserError(
            f"parallel: {product} = {given} devices, but the {jax.process_count()} processes have {devices}: all must take "
            f"part; set an axis to -1 to fill up"
        )
    return sizes


def meshes(devices: int) -> Iterator[dict[str, int]]:
    """All sizes of the axes that multiply to `devices`."""
    for data in divisors(devices):
        for pipe in divisors(devices // data):
            for tensor in divisors(devices // data // pipe):
                for expert in divisors(devices // data // pipe // tensor):
                    yield dict(zip(AXES, (data, pipe, devices // (data * pipe * tensor * expert), expert, tensor), strict=True))


def _position(device) -> tuple[int, int, int]:
    """Slice, host, number in the host: the hierarchy of links, slowest first."""
    return getattr(device, "slice_index", 0) or 0, device.process_index, device.id


def ordered(devices: Sequence, shape: Sequence[int]) -> np.ndarray:
    """`devices` as an array of `shape`, whose last axes lie on the fastest links.

    Machines without a torus are ordered by host and number. A TPU slice's torus is laid out by JAX, which maps axes onto its
    dimensions; the leading axes run across slices.
    """
    devices = sorted(devices, key=_position)
    if not hasattr(devices[0], "coords"):
        return np.asarray(devices).reshape(shape)
    slices = len({_position(d)[0] for d in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return _across_slices(devices, shape, slices)


def _across_slices(devices: Sequence, shape: Sequence[int], slices: int) -> np.ndarray:
    """Leading axes across slices, the rest inside, each slice's torus laid out by JAX."""
    across, inside, left = [], [], slices
    for size in shape:
        outer = math.gcd(size, left)
        across.append(outer)
        inside.append(size // outer)
        left //= outer
    if left > 1:
        raise UserError(f"parallel: no leading axes of {tuple(shape)} cover the {slices} slices; make parallel.data={slices}")
    return mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)


def make_mesh(config: ParallelConfig, devices: Sequence | None = None) -> Mesh:
    """The mesh over `devices` (all of this run's by default)."""
    devices = jax.devices() if devices is None else devices
    shape = tuple(axis_sizes(config, len(devices)).values())
    return Mesh(ordered(devices[: math.prod(shape)], shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def ranks_per_node(mesh: Mesh) -> int:
    """How many neighbours along `expert` share a host (with GPUs, its fast links)."""
    along = np.moveaxis(mesh.devices, AXES.index("expert"), -1)[0, 0, 0, 0]
    hosts = [_position(d)[:2] for d in along]
    return next((i for i, host in enumerate(hosts) if host != hosts[0]), len(hosts))


assert tuple(f.name for f in fields(ParallelConfig))[: len(AXES)] == AXES
