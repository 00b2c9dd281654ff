"""`parallel.compress=auto`: whether gradients should cross `data` in few bits, by the arithmetic behind `dsv3 plan --search`.

They should where whole gradients would hold a step up for more than a twentieth of it: then the links of `data` are slow for
what they carry. Elsewhere 2 bits save little and cost passes over memory, and rounding.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dsv3_jax.config import Config
from dsv3_jax.plan.analytic import GRADIENTS, Estimator
from dsv3_jax.plan.figures import ASSUMED
from dsv3_jax.plan.topologies import EXAMPLES, Topology
from dsv3_jax.precision.platforms import platform_of

_THRESHOLD = 0.05  # of a step
_BITS = 2


def topology_of(devices: Sequence[Any]) -> Topology | None:
    """Of the devices that a run has; None where nothing is known of their links, or they are no whole torus or hosts."""
    kind = platform_of(devices[0]).name
    if kind not in EXAMPLES:
        return None
    slices = {getattr(d, "slice_index", None) or 0 for d in devices}
    if devices[0].platform == "tpu":
        coordinates = zip(*(d.coords for d in devices), strict=True)
        found = Topology(kind, tuple(max(c) - min(c) + 1 for c in coordinates), len(slices))
    else:  # JAX numbers NVLink domains as slices, where it knows them
        hosts = len(slices) if len(slices) > 1 else len({d.process_index for d in devices})
        found = Topology(kind, (hosts, len(devices) // hosts))
    return found if found.size == len(devices) else None


def decided(config: Config, topology: Topology | None, sizes: dict[str, int]) -> tuple[Config, str]:
    """(the configuration without `auto`, why; nothing where it was not asked for). `sizes` are those of the mesh's axes."""
    if config.parallel.compress != "auto":
        return config, ""
    whole, few = (replace(config, parallel=replace(config.parallel, compress=bits)) for bits in (0, _BITS))
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
    return few, f"parallel.compress=auto: {_BITS} bits, {facts}, {_BITS} bits for {after:.2g} s"
