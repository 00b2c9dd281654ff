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

Place = tuple[int, int, tuple[int, ...]]  # slice, host, coordinates of the chip


@dataclass(frozen=True)
class Collective:
    """Of one instruction. `groups`: partitions; of a permute, pairs (source, target)."""

    name: str
    kind: str
    groups: tuple[tuple[int, ...], ...]
    axes: tuple[str, ...]  # that its groups extend along
    bytes: float  # that a device sends
    op_name: str

    @property
    def size(self) -> int:
        """Devices of a group; of a permute, 2."""
        return len(self.groups[0])


def sent_bytes(kind: str, operand_bytes: float, size: int) -> float:
    """That a device of a group of `size` sends, at least."""
    if kind == "collective-permute":
        return operand_bytes
    share = {"all-gather": size - 1, "all-reduce": 2 * (size - 1) / size}.get(kind, (size - 1) / size)
    return operand_bytes * share


@dataclass(frozen=True)
class Route:
    """How a collective's bytes leave a device: by link, in bytes and seconds; links work at the same time."""

    bytes: dict[str, float]
    seconds: float
    directions: tuple[str, ...]  # what it occupies


class Links:
    """The links between the devices of a topology, in the order of the program's partitions."""

    def __init__(self, kind: str, places: list[Place], slice_shape: tuple[int, ...]):
        self._facts = HARDWARE[kind]["links"]
        self._places = places
        self._torus = slice_shape if "ici" in self._facts else ()

    def route(self, c: Collective) -> Route:
        if c.kind == "collective-permute":
            return self._permute(c)
        group = [self._places[i] for i in c.groups[0]]  # all groups look alike
        apart, near = self.spread(c.groups[0])
        across, inside = self._split(c, apart, near)
        found: dict[str, float] = {}
        seconds = 0.0
        if across:
            found["network"] = across
            seconds = across / (self._facts["network"]["gb_s"] * 1e9) + self._latency("network", c, apart)
        fast = "ici" if self._torus else "nvlink"
        if inside:
            found[fast] = inside
            members = [p for p in group if self._island(p) == self._island(group[0])]
            rate = self._torus_rate(c.kind, members) if self._torus else self._facts["nvlink"]["gb_s"] * 1e9
            seconds = max(seconds, inside / rate + self._latency(fast, c, near))
        return Route(found, seconds, ("network",) if across and not inside else (fast + "+", fast + "-"))

    def spread(self, group: tuple[int, ...]) -> tuple[int, int]:
        """(slices or hosts that a group is on, members on the fullest of them)."""
        islands = Counter(self._island(self._places[i]) for i in group)
        return len(islands), max(islands.values())

    def _island(self, place: Place) -> int:
        """What only the network leaves: a slice, or a host."""
        return place[0] if self._torus else place[1]

    def link(self, name: str, efficiency: float) -> Link:
        """As one rank sees it: of "nvlink" or "network"."""
        return Link(self._facts[name]["latency_us"] * 1e-6, self._facts[name]["gb_s"] * 1e9 * efficiency)

    def across_slices(self, kind: str, operand_bytes: float) -> Route:
        """Of what a TPU's runtime sums or gathers between slices, each device with those in its place."""
        slices = len({p[0] for p in self._places})
        sent, facts = sent_bytes(kind, operand_bytes, slices), self._facts["network"]
        return Route({"network": sent}, sent / (facts["gb_s"] * 1e9) + facts["latency_us"] * 1e-6, ("network",))

    def axes_across_slices(self, mesh: dict[str, int]) -> tuple[str, ...]:
        """The mesh axes along which slices differ."""
        slices = np.array([p[0] for p in self._places]).reshape(tuple(mesh.values()))
        return tuple(axis for d, axis in enumerate(mesh) if (slices != slices.take([0], d)).any())

    def _latency(self, link: str, c: Collective, devices: int) -> float:
        """Of as many messages one after the other as halving and doubling take; an exchange takes one."""
        steps = 1 if c.kind.endswith("all-to-all") else math.ceil(math.log2(max(devices, 2)))
        return self._facts[link]["latency_us"] * 1e-6 * steps * (2 if c.kind == "all-reduce" else 1)

    def _split(self, c: Collective, apart: int, near: int) -> tuple[float, float]:
        """Bytes a device sends across slices or hosts, and inside: first inside, so that each sends its part across once."""
        if apart == 1:
            return 0.0, c.bytes
        if c.kind.endswith("all-to-all"):
            return c.bytes * (c.size - near) / (c.size - 1), c.bytes * (near - 1) / (c.size - 1)
        return c.bytes * (apart - 1) / apart * c.size / (c.size - 1) / near, c.bytes * (near - 1) / near * c.size / (c.size - 1)

    def _torus_rate(self, kind: str, members: list[Place]) -> float:
        """Bytes a second of a device whose group lies like this, the other groups doing the same at the same time."""
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
        pairs = [(self._places[a], self._places[b]) for a, b in c.groups if a != b]
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

    def _hops(self, pairs: list[tuple[Place, Place]]) -> tuple[float, str]:
        """Mean steps on the torus, and the direction that most bytes go."""
        shape = np.array(self._torus)
        step = np.array([b[2] for _, b in pairs]) - np.array([a[2] for a, _ in pairs])
        step = np.where(shape > 2, (step + shape // 2) % shape - shape // 2, step)  # the short way round
        return float(np.abs(step).sum(1).mean()), "+" if step.sum() >= 0 else "-"
