"""How gradients cross `data`, and `parallel.compress=auto`: whether in few bits, by the arithmetic of `dsv3 plan --search`.

In few bits they should where whole gradients would hold a step up for more than a twentieth of it: then the links of `data` are
slow for what they carry. Elsewhere 2 bits save little and cost passes over memory, and rounding.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from dsv3_jax.config import Config
from dsv3_jax.cost.efficiency import ASSUMED, Efficiency
from dsv3_jax.cost.estimate import GRADIENTS, Estimator, few_bits_share
from dsv3_jax.cost.topologies import Topology
from dsv3_jax.precision.platforms import HARDWARE, platform_of

_THRESHOLD = 0.05  # of a step
_BITS = 2


def topology_of(devices: Sequence[Any]) -> Topology | None:
    """Of the devices that a run has; None where nothing is known of their links, or they are no whole torus or hosts."""
    kind = platform_of(devices[0]).name
    if kind not in HARDWARE:
        return None
    slices = {getattr(d, "slice_index", None) or 0 for d in devices}
    if devices[0].platform == "tpu":
        coordinates = zip(*(d.coords for d in devices), strict=True)
        found = Topology(kind, tuple(max(c) - min(c) + 1 for c in coordinates), len(slices))
    else:  # JAX numbers NVLink domains as slices, where it knows them
        hosts = len(slices) if len(slices) > 1 else len({d.process_index for d in devices})
        found = Topology(kind, (hosts, len(devices) // hosts))
    return found if found.size == len(devices) else None


def _with(config: Config, bits: Literal[0, 1, 2, 4, 8]) -> Config:
    return replace(config, parallel=replace(config.parallel, compress=bits))


def resolve_compression(config: Config, topology: Topology | None, sizes: dict[str, int]) -> tuple[Config, str]:
    """(the configuration without `auto`; why, and of how many gradients, or nothing where few bits were not asked for).

    `sizes` are those of the mesh's axes.
    """
    if config.parallel.compress != "auto":
        return config, _told(config, sizes)
    whole, few = (_with(config, bits) for bits in (0, _BITS))
    if sizes["data"] == 1:
        return whole, "parallel.compress=auto: off, data has one replica"
    if topology is None or topology.size != math.prod(sizes.values()):
        return whole, "parallel.compress=auto: off, nothing is known of the links between these devices"
    estimator = Estimator(topology, ASSUMED)
    step = estimator.estimate(whole, sizes)
    before, after = (estimator.unhidden(GRADIENTS, estimator.estimate(c, sizes).communication[GRADIENTS]) for c in (whole, few))
    share = before / step.seconds
    facts = f"whole gradients would hold a step of {step.seconds:.3g} s up for {before:.2g} s ({share:.0%}) on {topology}"
    if share <= _THRESHOLD or after >= before:
        return whole, f"parallel.compress=auto: off, {facts}, which is not worth it (more than {_THRESHOLD:.0%} is)"
    return few, f"parallel.compress=auto: {_BITS} bits, {facts}, {_BITS} bits for {after:.2g} s; {_told(few, sizes)}"


def _told(config: Config, sizes: dict[str, int]) -> str:
    """How many of a device's gradients few bits are for."""
    if not config.parallel.compress or sizes["data"] == 1:
        return ""
    share = few_bits_share(config, sizes)
    return f"{share:.1%} of a device's gradients cross `data` in {config.parallel.compress} bits, the rest in float32"


@dataclass(frozen=True)
class Way:
    """In which gradients, once summed inside each replica, can cross `data`."""

    algorithm: str
    seconds: float
    taken: bool  # by the step as configured; of sums, the one that takes least, which a library of collectives chooses


def ways(config: Config, topology: Topology, sizes: dict[str, int], efficiency: Efficiency) -> list[Way]:
    """Sums in float32 and an exchange of codes on this topology's links; none for one replica.

    Where replicas share hosts (or slices), they can be summed there first: a sum does so by itself, an exchange of codes if the
    axis is `fsdp`, whose sums are inside a replica.
    """
    if sizes["data"] == 1:
        return []
    config, _ = resolve_compression(config, topology, sizes)
    estimator = Estimator(topology, efficiency)
    apart, near = estimator.replicas(sizes)
    bits = config.parallel.compress or _BITS
    assert bits != "auto", "decided above"
    sums = {f"{name}, float32": s for name, s in estimator.flat(_with(config, 0), sizes).items()}
    if not sums or (near > 1 and apart > 1):
        name = "two levels, float32" if sums else "rings of the torus, float32"
        sums[name] = estimator.across_data(_with(config, 0), sizes)
    few = {f"direct, {bits} bits": estimator.across_data(_with(config, bits), sizes)}
    taken = next(iter(few)) if config.parallel.compress else min(sums, key=lambda name: sums[name])
    if near > 1 and apart > 1:
        first = estimator.across_data(_with(config, 0), sizes | {"data": near})
        then = sizes | {"data": apart, "fsdp": sizes["fsdp"] * near}
        name = f"two levels, {bits} bits (parallel.data={apart} parallel.fsdp={then['fsdp']})"
        few[name] = first + estimator.across_data(_with(config, bits), then)
    return [Way(name, seconds, name == taken) for name, seconds in (sums | few).items()]
