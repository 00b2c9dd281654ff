"""The links between the devices of a topology, and what a collective sends over them.

Bytes are what one device must send at least (rings, recursive halving and direct exchanges all send as much):
all-gather (n-1) * shard, reduce-scatter (n-1)/n * input, all-reduce 2 (n-1)/n * input, all-to-all (n-1)/n * input,
permute its input. Bandwidth and latency are those of `hardware.yaml`.
"""

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np

from dsv3_jax.cost.all_reduce import Link
from dsv3_jax.precision.platforms import HARDWARE

Location = tuple[int, int, tuple[int, ...]]  # of a device: slice, host, coordinates of the chip


@dataclass(frozen=True)
class Collective:
    """A collective instruction of a program."""

    name: str
    kind: str
    groups: tuple[tuple[int, ...], ...]  # partitions; for a permute, pairs (source, target)
    axes: tuple[str, ...]  # mesh axes that its groups extend along
    bytes: float  # sent by a device
    op_name: str

    @property
    def size(self) -> int:
        """Devices in a group; 2 for a permute."""
        return len(self.groups[0])


def sent_bytes(kind: str, operand_bytes: float, size: int) -> float:
    """Bytes that each device must send at least, for a collective over `size` devices with `operand_bytes` on each."""
    if kind == "collective-permute":
        return operand_bytes
    share = {"all-gather": size - 1, "all-reduce": 2 * (size - 1) / size}.get(kind, (size - 1) / size)
    return operand_bytes * share


@dataclass(frozen=True)
class Route:
    """How a collective's bytes leave a device. Links work at the same time."""

    bytes: dict[str, float]  # by link
    seconds: float
    directions: tuple[str, ...]  # of links, occupied meanwhile


class Links:
    """The links between devices of one kind.

    Args:
        kind: An entry of hardware.yaml.
        locations: Of the devices, in the order of the program's partitions.
        slice_shape: The torus of a TPU slice; unused for GPUs.
    """

    def __init__(self, kind: str, locations: list[Location], slice_shape: tuple[int, ...]):
        self._facts = HARDWARE[kind]["links"]
        self._locations = locations
        self._torus = slice_shape if "ici" in self._facts else ()

    def route(self, c: Collective) -> Route:
        """The links that a collective uses, and its seconds at their full rate."""
        if c.kind == "collective-permute":
            return self._permute(c)
        group = [self._locations[i] for i in c.groups[0]]  # all groups look alike
        islands, per_island = self.spread(c.groups[0])
        across, inside = self._split(c, islands, per_island)
        found: dict[str, float] = {}
        seconds = 0.0
        if across:
            found["network"] = across
            seconds = across / (self._facts["network"]["gb_s"] * 1e9) + self._latency("network", c, islands)
        fast = "ici" if self._torus else "nvlink"
        if inside:
            found[fast] = inside
            members = [p for p in group if self._island(p) == self._island(group[0])]
            rate = self._torus_rate(c.kind, members) if self._torus else self._facts["nvlink"]["gb_s"] * 1e9
            seconds = max(seconds, inside / rate + self._latency(fast, c, per_island))
        return Route(found, seconds, ("network",) if across and not inside else (fast + "+", fast + "-"))

    def spread(self, group: tuple[int, ...]) -> tuple[int, int]:
        """(slices or hosts that a group is on, members on the fullest of them)."""
        islands = Counter(self._island(self._locations[i]) for i in group)
        return len(islands), max(islands.values())

    def _island(self, location: Location) -> int:
        """The slice or host, which only the network connects to others."""
        return location[0] if self._torus else location[1]

    def link(self, name: str, efficiency: float) -> Link:
        """ "nvlink" or "network" as one rank sees it, at this share of its rate."""
        return Link(self._facts[name]["latency_us"] * 1e-6, self._facts[name]["gb_s"] * 1e9 * efficiency)

    def across_slices(self, kind: str, operand_bytes: float) -> Route:
        """The route of what a TPU's runtime sums or gathers between slices, among devices at the same position of each."""
        slices = len({p[0] for p in self._locations})
        sent, facts = sent_bytes(kind, operand_bytes, slices), self._facts["network"]
        return Route({"network": sent}, sent / (facts["gb_s"] * 1e9) + facts["latency_us"] * 1e-6, ("network",))

    def axes_across_slices(self, mesh: dict[str, int]) -> tuple[str, ...]:
        """The mesh axes along which slices differ."""
        slices = np.array([p[0] for p in self._locations]).reshape(tuple(mesh.values()))
        return tuple(axis for d, axis in enumerate(mesh) if (slices != slices.take([0], d)).any())

    def _latency(self, link: str, c: Collective, devices: int) -> float:
        """Seconds of the messages that halving and doubling send one after the other; an exchange sends one."""
        steps = 1 if c.kind.endswith("all-to-all") else math.ceil(math.log2(max(devices, 2)))
        return self._facts[link]["latency_us"] * 1e-6 * steps * (2 if c.kind == "all-reduce" else 1)

    def _split(self, c: Collective, islands: int, per_island: int) -> tuple[float, float]:
        """(bytes a device sends to other islands, bytes inside its own). Sums go inside first: each part crosses once."""
        if islands == 1:
            return 0.0, c.bytes
        if c.kind.endswith("all-to-all"):
            return c.bytes * (c.size - per_island) / (c.size - 1), c.bytes * (per_island - 1) / (c.size - 1)
        across = c.bytes * (islands - 1) / islands * c.size / (c.size - 1) / per_island
        return across, c.bytes * (per_island - 1) / per_island * c.size / (c.size - 1)

    def _torus_rate(self, kind: str, members: list[Location]) -> float:
        """Bytes per second of each device, while all groups of this shape communicate at the same time."""
        chips = np.array(sorted({p[2] for p in members}))
        cores = self._facts["ici"]["cores"]
        link = self._facts["ici"]["gb_s"] * 1e9
        extents = [len(set(chips[:, d])) for d in range(len(self._torus))]
        spanned = [(e, e == n and n > 2) for e, n in zip(extents, self._torus, strict=True) if e > 1]  # extent, is a ring
        if not spanned:
            return link * 2 * len(self._torus)  # between the cores of a chip: no link, and as fast as all of them
        if kind.endswith("all-to-all"):
            # a ring of e: bytes go e/4 steps on average over two links; a line's middle link carries half of all bytes
            return min(link * (8 if ring else 4) / e for e, ring in spanned) / cores
        return sum(link * (2 if ring else 1) for _, ring in spanned) / cores

    def _permute(self, c: Collective) -> Route:
        pairs = [(self._locations[a], self._locations[b]) for a, b in c.groups if a != b]
        if not pairs:
            return Route({}, 0.0, ())
        fast = "ici" if self._torus else "nvlink"
        far = [self._island(a) != self._island(b) for a, b in pairs]
        if any(far):
            facts = self._facts["network"]
            return Route({"network": c.bytes}, c.bytes / (facts["gb_s"] * 1e9) + facts["latency_us"] * 1e-6, ("network",))
        facts = self._facts[fast]
        hops, sign = self._hops(pairs) if self._torus else (1.0, "+")
        seconds = c.bytes * max(hops, 1.0) / (facts["gb_s"] * 1e9) + facts["latency_us"] * 1e-6 * max(hops, 1.0)
        return Route({fast: c.bytes}, seconds, (fast + sign,))

    def _hops(self, pairs: list[tuple[Location, Location]]) -> tuple[float, str]:
        """(mean steps on the torus, the direction that most bytes go in)."""
        shape = np.array(self._torus)
        step = np.array([b[2] for _, b in pairs]) - np.array([a[2] for a, _ in pairs])
        step = np.where(shape > 2, (step + shape // 2) % shape - shape // 2, step)  # the short way round
        return float(np.abs(step).sum(1).mean()), "+" if step.sum() >= 0 else "-"
