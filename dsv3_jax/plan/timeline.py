"""A scheduled program played through with the cost model: how long a step takes, which communication hides behind work.

One stream of work runs the instructions in their order. A collective with a begin and an end occupies its links from its
begin on (behind what occupies them already) and the stream waits at its end for what is left; one without occupies links and
stream. Copies between a TPU's memories and its SparseCores' work are such pairs too. Loops are played once and count as often
as they run; nothing reaches from one round into the next.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from dsv3_jax.plan.communication import Collective, Links, Route, kind_of, read_collective
from dsv3_jax.plan.cost import CostModel, Work
from dsv3_jax.plan.hlo import Computation, Instruction, Program

PARTS = ("optimizer", "mtp_head", "head", "attention", "ffn")
# What jax.checkpoint does again, and the experts' forward pass within their own backward one (parallel/experts.py).
_AGAIN = re.compile(r"rematted_computation|shard_map/while/body/jvp\(")


@dataclass
class Moved:
    """A kind of collective along some axes over a link: how often a step, what a device sends, how long that takes."""

    count: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0
    exposed: float = 0.0  # of the seconds: those in which the stream of work stands still


@dataclass
class Timeline:
    """Of one step. Times in seconds. `moved`: by (kind, axes, link)."""

    seconds: float = 0.0
    work_seconds: float = 0.0
    moved: dict[tuple[str, tuple[str, ...], str], Moved] = field(default_factory=dict)
    work: Work = field(default_factory=Work)
    matmul_seconds: float = 0.0  # products at their rate
    memory_seconds: float = 0.0  # bytes at theirs
    recomputed: float = 0.0  # FLOPs of the forward pass that are done again
    parts: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # seconds of work by part of the model
    waited: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # for other pairs: copies, SparseCores
    assumed: dict[str, float] = field(default_factory=dict)  # loops whose rounds depend on data, and what was taken
    refused: list[str] = field(default_factory=list)  # loops whose rounds nothing tells

    def add(self, other: "Timeline", times: float) -> None:
        self.seconds += times * other.seconds
        self.work_seconds += times * other.work_seconds
        self.matmul_seconds += times * other.matmul_seconds
        self.memory_seconds += times * other.memory_seconds
        self.work = self.work + Work(Counter({f: n * times for f, n in other.work.flops.items()}), other.work.bytes * times)
        for key, moved in other.moved.items():
            mine = self.moved.setdefault(key, Moved())
            mine.count += times * moved.count
            mine.bytes += times * moved.bytes
            mine.seconds += times * moved.seconds
            mine.exposed += times * moved.exposed
        for what, seconds in other.waited.items():
            self.waited[what] += times * seconds
        self.assumed |= {k: max(n, self.assumed.get(k, 0.0)) for k, n in other.assumed.items()}
        for part, seconds in other.parts.items():
            self.parts[part] += times * seconds
        self.recomputed += times * other.recomputed
        self.refused += [loop for loop in other.refused if loop not in self.refused]

    @property
    def communication(self) -> float:
        return sum(m.seconds for m in self.moved.values())

    @property
    def exposed(self) -> float:
        return sum(m.exposed for m in self.moved.values())

    @property
    def hidden(self) -> float | None:
        """Share of the communication's time; None without any."""
        return 1 - self.exposed / self.communication if self.communication else None


@dataclass
class _Pending:
    """What has begun and not ended: when it will, and what to put the waiting down to."""

    finish: float
    moved: Moved | None
    what: str
    seconds: float


class Player:
    """`rounds(op_name, body)` tells how often a loop runs whose trip count the program does not; None if unknown."""

    def __init__(
        self, program: Program, mesh: dict[str, int], links: Links, cost: CostModel, link_efficiency: float,
        ragged_fill: float, imbalance: float, rounds: Callable[[Instruction, Computation], float | None],
    ):  # fmt: skip
        self._program, self._mesh, self._links, self._cost = program, mesh, links, cost
        self._link_efficiency, self._fill, self._imbalance, self._rounds = link_efficiency, ragged_fill, imbalance, rounds
        self._played: dict[str, Timeline] = {}
        self._reached: set[str] = set()  # collectives

    def unreached(self) -> list[str]:
        """Collectives of the program that were not played, and so are missing in every figure: there should be none."""
        everything = {i.name for c in self._program.computations.values() for i in c if kind_of(i)}
        return sorted(everything - self._reached)

    def play(self) -> Timeline:
        return self._play(self._program.entry)

    def _play(self, name: str) -> Timeline:
        if name not in self._played:
            self._played[name] = self._run(self._program.computations[name])
        return self._played[name]

    def _run(self, computation: Computation) -> Timeline:
        line, free = Timeline(), {}
        pending: dict[str, Any] = {}  # by name: what has begun, or what will begin it
        for i in computation:
            if i.opcode.endswith("-done"):
                self._end(i, line, pending)
            elif i.opcode.endswith(("-start", "-update")):
                self._begin(i, computation, line, free, pending)
            elif kind_of(i):
                done = self._collective(i, computation, line, free)
                assert done.moved
                done.moved.exposed += done.seconds  # what it waited for counts as that one's
                line.seconds = done.finish
            elif i.opcode in ("send", "recv") and "_xla_megascale" in i.attributes:
                self._across_slices(i, computation, line, free, pending)
            elif fused := self._fused(i):
                self._fusion(i, computation, *fused, line, free, pending)
            elif i.opcode == "while":
                self._loop(i, computation, line)
            elif i.opcode == "conditional":
                line.add(max((self._play(b) for b in i.branches), key=lambda t: t.seconds), 1)
            elif i.opcode == "call":
                line.add(self._play(i.called("to_apply") or ""), 1)
            else:
                self._do(i, self._cost.work(i, computation), line)
        line.seconds = max([line.seconds, *(p.finish for p in pending.values() if isinstance(p, _Pending))])
        return line

    def _do(self, i: Instruction, work: Work, line: Timeline) -> None:
        seconds = self._cost.seconds(work)
        product, memory = self._cost.bounds(work)
        line.seconds += seconds
        line.work_seconds += seconds
        line.matmul_seconds += product
        line.memory_seconds += memory
        line.work = line.work + work
        line.parts[part_of(i.op_name)] += seconds
        if _AGAIN.search(i.op_name):
            line.recomputed += work.flops.total()

    def _across_slices(
        self, i: Instruction, inside: Computation, line: Timeline, free: dict[str, float], pending: dict[str, Any]
    ) -> None:  # fmt: skip
        """What TPU slices exchange: a send to the runtime, and a receipt of the sum, that name the same meeting."""
        meeting = re.search(r'rendezvous="([^"]*)"', i.attributes)
        kind = re.search(r'transfer_type="(\w+)"', i.attributes)
        key = f"meeting {meeting[1] if meeting else ''}"
        if i.opcode == "recv":
            pending[i.name] = lambda: pending.pop(key)
            return
        name = kind[1].lower().replace("_", "-") if kind else "all-reduce"
        route = self._links.across_slices(name, float(inside.instructions[i.operands[0]].bytes))
        seconds = route.seconds / self._link_efficiency
        begin = max(line.seconds, free.get("network", 0.0))
        free["network"] = begin + seconds
        c = Collective(i.name, name, (), self._links.axes_across_slices(self._mesh), 0.0, i.op_name)
        pending[key] = _Pending(begin + seconds, _record(c, route, seconds, line), name, seconds)

    def _fused(self, i: Instruction) -> tuple[Instruction, Computation] | None:
        """The collective in a fusion, and the computation that it stands in."""
        called = i.called("calls") if i.opcode == "fusion" else None
        if called:
            inner = self._program.computations[called]
            for j in inner:
                if kind_of(j):
                    return j, inner
                if deeper := self._fused(j):
                    return deeper
        return None

    def _fusion(
        self, i: Instruction, inside: Computation, moves: Instruction, inner: Computation, line: Timeline,
        free: dict[str, float], pending: dict[str, Any],
    ) -> None:  # fmt: skip
        """A collective fused with what it is for: on TPU, an all-reduce of which a part is kept, or (v5e) one that goes on
        within the kernels between the fusions that begin and end it, which name the same channel."""
        self._reached.add(moves.name)
        channel = re.search(r"channel_id=\d+", moves.attributes)
        key = channel[0] if channel else moves.name
        if i.name.startswith("async-collective-start"):
            pending[key] = self._collective(moves, inner, line, free)
        elif i.name.startswith("async-collective-done") and key in pending:
            self._wait(pending.pop(key), line)
        else:
            if key not in pending:
                done = self._collective(moves, inner, line, free)
                assert done.moved
                done.moved.exposed += done.seconds
                line.seconds = done.finish
            work = self._cost.work(i, inside)
            if work.flops:
                self._do(i, work, line)

    def _collective(self, i: Instruction, inside: Computation, line: Timeline, free: dict[str, float]) -> _Pending:
        """Occupies its links from now on, or from when they are free."""
        self._reached.add(i.name)
        c = read_collective(i, inside, self._mesh, self._fill)
        if c.kind == "all-reduce" and any(j.opcode == "dynamic-slice" and i.name in j.operands for j in inside):
            c = replace(c, kind="reduce-scatter", bytes=c.bytes / 2)  # of whose result a device keeps its part
        route = self._links.route(c)
        seconds = route.seconds / self._link_efficiency
        if c.kind == "ragged-all-to-all":
            seconds *= self._imbalance  # the fullest device's
        begin = max([line.seconds, *(free.get(d, 0.0) for d in route.directions)])
        for direction in route.directions:
            free[direction] = begin + seconds
        return _Pending(begin + seconds, _record(c, route, seconds, line), c.kind, seconds)

    def _begin(
        self, i: Instruction, inside: Computation, line: Timeline, free: dict[str, float], pending: dict[str, Any]
    ) -> None:
        """Of a pair: a collective, or a SparseCore's work or a copy, one of a kind after the other.

        What a SparseCore does stands in a computation of its own, collectives too, and begins once it is given its operands.
        """
        if i.opcode.endswith("-update"):
            begun = pending.pop(i.operands[0], None)
            pending[i.name] = begun if begun is None or isinstance(begun, _Pending) else begun()
            return
        called = next((c for key in ("calls", "to_apply", "called_computations") if (c := i.called(key))), None)
        inner = self._program.computations.get(called or "")
        if kind_of(i):
            pending[i.name] = self._collective(i, inside, line, free)
            return

        def begin() -> _Pending:
            return self._elsewhere(i, inside, inner, line, free)

        pending[i.name] = begin() if i.operands else begin

    def _elsewhere(
        self, i: Instruction, inside: Computation, inner: Computation | None, line: Timeline, free: dict[str, float]
    ) -> _Pending:  # fmt: skip
        kind = i.opcode.removesuffix("-start")
        if inner and (moves := next((j for j in inner if kind_of(j)), None)):
            return self._collective(moves, inner, line, free)
        if inner:
            played = self._play(inner.name)
            line.add(Timeline(work=played.work), 1)
            seconds = played.seconds
        else:
            operands = [inside.instructions[n] for n in i.operands if n in inside.instructions]
            seconds = sum(o.bytes for o in operands) / self._cost.memory
        begin = max(line.seconds, free.get(kind, 0.0))
        free[kind] = begin + seconds
        return _Pending(begin + seconds, None, kind, seconds)

    def _end(self, i: Instruction, line: Timeline, pending: dict[str, Any]) -> None:
        begun = pending.pop(i.operands[0], None) if i.operands else None
        if begun is None:
            return
        self._wait(begun if isinstance(begun, _Pending) else begun(), line)

    def _wait(self, begun: _Pending, line: Timeline) -> None:
        wait = max(0.0, begun.finish - line.seconds)
        if begun.moved is not None:
            begun.moved.exposed += min(wait, begun.seconds)
        elif wait:
            line.waited[begun.what] += wait
        line.seconds += wait

    def _loop(self, i: Instruction, inside: Computation, line: Timeline) -> None:
        body = self._play(i.called("body") or "")
        trips: float | None = self._program.trip_count(i, inside)
        if trips is None:
            trips = self._rounds(i, self._program.computations[i.called("body") or ""])
            if trips is None:
                line.refused.append(i.op_name or i.name)
                trips = 1
            else:
                line.assumed[_short(i.op_name)] = max(trips, line.assumed.get(_short(i.op_name), 0.0))
        line.add(body, trips)


def part_of(op_name: str) -> str:
    """The part of the model that an instruction belongs to, by the scopes of its name."""
    scopes = set(re.split(r"[/()]", op_name))
    return next((part for part in PARTS if part in scopes), "rest")


def _record(c: Collective, route: Route, seconds: float, line: Timeline) -> Moved:
    """One entry a link; seconds go to the slower one, which is the first."""
    moved = None
    for link, sent in route.bytes.items() or {"none": 0.0}.items():
        entry = line.moved.setdefault((c.kind, c.axes, link), Moved())
        entry.count += 1
        entry.bytes += sent
        moved = moved or entry
    assert moved
    moved.seconds += seconds
    return moved


def _short(op_name: str) -> str:
    """The last names of where a loop comes from."""
    return "/".join(op_name.split("/")[-3:])
