"""How gradients can cross the `data` axis, and whether `parallel.compress=auto` compresses them, by estimated times.

Compression pays where uncompressed gradients would delay a step by more than a twentieth: then the links of `data` are slow for
what they carry. Elsewhere it saves little, and costs passes over memory and rounding.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

from dsv3_jax.config import Config
from dsv3_jax.cost.efficiency import ASSUMED, Efficiency
from dsv3_jax.cost.estimate import GRADIENTS, Estimator, compressed_share
from dsv3_jax.cost.topologies import Topology

_WORTHWHILE_DELAY = 0.05  # of a step
_AUTO_BITS = 2


def _with_bits(config: Config, bits: Literal[0, 1, 2, 4, 8]) -> Config:
    return replace(config, parallel=replace(config.parallel, compress=bits))


def resolve_compression(config: Config, topology: Topology | None, sizes: dict[str, int]) -> tuple[Config, str]:
    """Replace `parallel.compress=auto` by 0 or 2 bits.

    Args:
        topology: That of the run's devices, or None if nothing is known of it.
        sizes: The sizes of the mesh's axes.

    Returns:
        The configuration, and a sentence that says why, with the share of a device's gradients that is compressed. The sentence
        is empty if compression was not asked for.
    """
    if config.parallel.compress != "auto":
        return config, _describe_share(config, sizes)
    uncompressed, compressed = (_with_bits(config, bits) for bits in (0, _AUTO_BITS))
    if sizes["data"] == 1:
        return uncompressed, "parallel.compress=auto: off, data has one replica"
    if topology is None or topology.size != math.prod(sizes.values()):
        return uncompressed, "parallel.compress=auto: off, nothing is known of the links between these devices"
    estimator = Estimator(topology, ASSUMED)
    step_seconds = estimator.estimate(uncompressed, sizes).seconds
    before, after = (
        estimator.exposed_seconds(GRADIENTS, estimator.exchange_seconds(c, sizes)) for c in (uncompressed, compressed)
    )
    share = before / step_seconds
    facts = f"uncompressed gradients would delay a step of {step_seconds:.3g} s by {before:.2g} s ({share:.0%}) on {topology}"
    if share <= _WORTHWHILE_DELAY or after >= before:
        return uncompressed, f"parallel.compress=auto: off, {facts}; compression is worth it above {_WORTHWHILE_DELAY:.0%}"
    why = f"parallel.compress=auto: {_AUTO_BITS} bits, {facts}, {_AUTO_BITS} bits by {after:.2g} s"
    return compressed, f"{why}; {_describe_share(compressed, sizes)}"


def _describe_share(config: Config, sizes: dict[str, int]) -> str:
    if not config.parallel.compress or sizes["data"] == 1:
        return ""
    share = compressed_share(config, sizes)
    return f"{share:.1%} of a device's gradients cross `data` in {config.parallel.compress} bits, the rest in float32"


@dataclass(frozen=True)
class ExchangeEstimate:
    """One algorithm by which gradients, summed inside each replica, can cross `data`."""

    algorithm: str
    seconds: float
    taken: bool  # by the step as configured; among float32 sums, the fastest, which libraries of collectives choose


def estimate_exchanges(
    config: Config, topology: Topology, sizes: dict[str, int], efficiency: Efficiency
) -> list[ExchangeEstimate]:
    """Estimated seconds of float32 sums and of compressed exchanges on this topology; empty for a single replica.

    Where replicas share hosts (or slices), they can be summed there first. A float32 sum does so by itself; a compressed
    exchange does if that axis is `fsdp`, whose sums are inside a replica.
    """
    if sizes["data"] == 1:
        return []
    config, _ = resolve_compression(config, topology, sizes)
    estimator = Estimator(topology, efficiency)
    hosts, replicas_per_host = estimator.replica_spread(sizes)
    two_levels = replicas_per_host > 1 and hosts > 1
    bits = config.parallel.compress or _AUTO_BITS
    assert bits != "auto", "resolved above"
    sums = {f"{name}, float32": s for name, s in estimator.flat_sum_seconds(_with_bits(config, 0), sizes).items()}
    if not sums or two_levels:
        name = "two levels, float32" if sums else "rings of the torus, float32"
        sums[name] = estimator.exchange_seconds(_with_bits(config, 0), sizes)
    compressed = {f"direct, {bits} bits": estimator.exchange_seconds(_with_bits(config, bits), sizes)}
    taken = next(iter(compressed)) if config.parallel.compress else min(sums, key=lambda name: sums[name])
    if two_levels:
        inside = estimator.exchange_seconds(_with_bits(config, 0), sizes | {"data": replicas_per_host})
        across = sizes | {"data": hosts, "fsdp": sizes["fsdp"] * replicas_per_host}
        name = f"two levels, {bits} bits (parallel.data={hosts} parallel.fsdp={across['fsdp']})"
        compressed[name] = inside + estimator.exchange_seconds(_with_bits(config, bits), across)
    return [ExchangeEstimate(name, seconds, name == taken) for name, seconds in (sums | compressed).items()]
