"""Simulates a scheduled program with the cost model: how long a step takes, which communication is hidden behind work.

One stream of work runs the instructions in their order. An asynchronous collective occupies its links from its start on (after
what already occupies them), and the stream waits at its end for what is left; a synchronous one occupies links and stream.
Copies between a TPU's memories and its SparseCores' work are asynchronous, too. Loops are simulated once and count as often as
they run; nothing overlaps from one iteration into the next.
"""

import bisect
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from dsv3_jax.cost.links import Collective, Links, Route
from dsv3_jax.parallel.experts import EXCHANGE, MORE_ROUNDS
from dsv3_jax.plan.communication import kind_of, read_collective
from dsv3_jax.plan.hlo import Computation, Instruction, Program
from dsv3_jax.plan.roofline import CostModel, Work

PARTS = ("optimizer", "mtp_head", "head", "attention", "ffn")
# What jax.checkpoint recomputes, and the experts' forward pass within their own backward pass (parallel/experts.py).
RECOMPUTED = re.compile(rf"rematted_computation|/(?:{EXCHANGE}|{MORE_ROUNDS})/(?:while/body/)?jvp\(")


@dataclass
class Moved:
    """A step's communication of one kind of collective, along some mesh axes, over one link."""

    count: float = 0.0
    bytes: float = 0.0  # sent by a device
    seconds: float = 0.0
    exposed: float = 0.0  # seconds without work at the same time


@dataclass
class Timeline:
    """Time, work and communication of a step, or of a part of it; times are in seconds."""

    seconds: float = 0.0
    work_seconds: float = 0.0
    moved: dict[tuple[str, tuple[str, ...], str], Moved] = field(default_factory=dict)  # by (kind, axes, link)
    work: Work = field(default_factory=Work)
    matmul_seconds: float = 0.0  # of the products at their peak rate
    memory_seconds: float = 0.0  # of the bytes at their peak rate
    recomputed: float = 0.0  # FLOPs of the forward pass that the backward pass recomputes
    parts: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # seconds of work by part of the model
    waited: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # seconds, for copies and SparseCores
    assumed: dict[str, float] = field(default_factory=dict)  # trip counts taken for loops whose own depend on data
    refused: list[str] = field(default_factory=list)  # loops of unknown trip count

    def add(self, other: "Timeline", times: float) -> None:
        """Append another timeline, run `times` times."""
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
        """Seconds of communication."""
        return sum(m.seconds for m in self.moved.values())

    @property
    def exposed(self) -> float:
        """Seconds of communication without work at the same time."""
        return sum(m.exposed for m in self.moved.values())

    @property
    def hidden(self) -> float | None:
        """Share of the communication's time that is hidden behind work; None without any."""
        return 1 - self.exposed / self.communication if self.communication else None


@dataclass
class _Transfer:
    """Something that runs beside the stream of work: a collective (with `moved`), a copy, a SparseCore's work."""

    begin: float
    finish: float
    what: str
    moved: Moved | None = None


@dataclass
class _Stream:
    """A computation being simulated."""

    line: Timeline = field(default_factory=Timeline)
    free: dict[str, float] = field(default_factory=dict)  # by resource, such as a link: when it is free
    begun: dict[str, "_Transfer | Callable[[], _Transfer]"] = field(default_factory=dict)  # by name; or what begins it
    works: list[tuple[float, float]] = field(default_factory=list)  # (begin, end) of work, in order
    transfers: list[_Transfer] = field(default_factory=list)

    def occupy(self, resources: tuple[str, ...], seconds: float, what: str, moved: Moved | None = None) -> _Transfer:
        """Occupy the resources from now on, or from when all are free."""
        begin = max([self.line.seconds, *(self.free.get(resource, 0.0) for resource in resources)])
        self.free |= dict.fromkeys(resources, begin + seconds)
        self.transfers.append(_Transfer(begin, begin + seconds, what, moved))
        return self.transfers[-1]

    def wait(self, transfer: _Transfer) -> None:
        """Let the stream stand still until the transfer is done."""
        if transfer.finish > self.line.seconds:
            if transfer.moved is None:
                self.line.waited[transfer.what] += transfer.finish - self.line.seconds
            self.line.seconds = transfer.finish

    def work(self, seconds: float) -> None:
        self.works.append((self.line.seconds, self.line.seconds + seconds))
        self.line.seconds += seconds

    def add(self, inner: Timeline, times: float) -> None:
        """Run another computation; to what goes on outside it, all of it counts as work."""
        self.works.append((self.line.seconds, self.line.seconds + times * inner.seconds))
        self.line.add(inner, times)

    def end(self) -> Timeline:
        """Finish, and find which part of each collective's time had no work at the same time."""
        self.line.seconds = max([self.line.seconds, *(t.finish for t in self.transfers)])
        ends = [end for _, end in self.works]
        for t in self.transfers:
            if t.moved is not None:
                beside = 0.0
                for begin, end in self.works[bisect.bisect(ends, t.begin) :]:
                    if begin >= t.finish:
                        break
                    beside += min(end, t.finish) - max(begin, t.begin)
                t.moved.exposed += max(0.0, t.finish - t.begin - beside)
        return self.line


class Player:
    """Simulates a program.

    Args:
        mesh: Axis sizes.
        link_efficiency: Share of the links' rate that is reached.
        ragged_fill: Share of its buffer that a ragged exchange sends.
        imbalance: Rows of the fullest device over the mean.
        rounds: The trip count of a loop (and its body) that the program does not state; None if unknown.
        branch: Which branch a conditional takes: `max`, the longest, or `min`.
    """

    def __init__(
        self, program: Program, mesh: dict[str, int], links: Links, cost: CostModel, link_efficiency: float,
        ragged_fill: float, imbalance: float, rounds: Callable[[Instruction, Computation], float | None],
        branch: Callable[..., Timeline] = max,
    ):  # fmt: skip
        self._program, self._mesh, self._links, self._cost = program, mesh, links, cost
        self._link_efficiency, self._fill, self._imbalance, self._rounds = link_efficiency, ragged_fill, imbalance, rounds
        self._branch = branch
        self._played: dict[str, Timeline] = {}
        self._reached: set[str] = set()  # collectives

    def unreached(self) -> list[str]:
        """Collectives of the program that were not simulated and are missing in all figures: there should be none."""
        everything = {i.name for c in self._program.computations.values() for i in c if kind_of(i)}
        return sorted(everything - self._reached)

    def play(self) -> Timeline:
        """The timeline of the program's entry computation."""
        return self._play(self._program.entry)

    def _play(self, name: str) -> Timeline:
        if name not in self._played:
            stream, computation = _Stream(), self._program.computations[name]
            for i in computation:
                self._next(i, computation, stream)
            self._played[name] = stream.end()
        return self._played[name]

    def _next(self, i: Instruction, inside: Computation, stream: _Stream) -> None:
        if i.opcode.endswith("-done"):
            self._end(i, stream)
        elif i.opcode.endswith("-update"):
            stream.begun[i.name] = _begun(stream.begun.pop(i.operands[0]))
        elif i.opcode.endswith("-start"):
            self._begin(i, inside, stream)
        elif kind_of(i):
            stream.wait(self._collective(i, inside, stream))
        elif i.opcode in ("send", "recv") and "_xla_megascale" in i.attributes:
            self._across_slices(i, inside, stream)
        elif fused := self._fused(i):
            self._fusion(i, inside, *fused, stream)
        elif i.opcode == "while":
            self._loop(i, inside, stream)
        elif i.opcode == "conditional":
            stream.add(self._branch((self._play(b) for b in i.branches), key=lambda t: t.seconds), 1)
        elif i.opcode == "call":
            stream.add(self._play(i.called("to_apply") or ""), 1)
        else:
            self._do(i, self._cost.work(i, inside), stream)

    def _do(self, i: Instruction, work: Work, stream: _Stream) -> None:
        line, seconds = stream.line, self._cost.seconds(work)
        product, memory = self._cost.bounds(work)
        stream.work(seconds)
        line.work_seconds += seconds
        line.matmul_seconds += product
        line.memory_seconds += memory
        line.work = line.work + work
        line.parts[part_of(i.op_name)] += seconds
        if RECOMPUTED.search(i.op_name):
            line.recomputed += work.flops.total()

    def _across_slices(self, i: Instruction, inside: Computation, stream: _Stream) -> None:
        """An exchange between TPU slices: a send to the runtime and a receive of the sum that name the same rendezvous."""
        rendezvous = re.search(r'rendezvous="([^"]*)"', i.attributes)
        kind = re.search(r'transfer_type="(\w+)"', i.attributes)
        key = f"rendezvous {rendezvous[1] if rendezvous else ''}"
        if i.opcode == "recv":
            stream.begun[i.name] = lambda: _begun(stream.begun.pop(key))
            return
        name = kind[1].lower().replace("_", "-") if kind else "all-reduce"
        route = self._links.across_slices(name, float(inside.instructions[i.operands[0]].bytes))
        c = Collective(i.name, name, (), self._links.axes_across_slices(self._mesh), 0.0, i.op_name)
        stream.begun[key] = self._transfer(c, route, stream)

    def _fused(self, i: Instruction) -> tuple[Instruction, Computation] | None:
        """(the collective in a fusion, the computation that contains it); None if there is none."""
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
        self, i: Instruction, inside: Computation, moves: Instruction, inner: Computation, stream: _Stream
    ) -> None:  # fmt: skip
        """A collective fused with other instructions, on TPU: an all-reduce of which a part is kept, or (v5e) one that goes on
        within the kernels between the fusions that start and end it, which name the same channel."""
        self._reached.add(moves.name)
        channel = re.search(r"channel_id=\d+", moves.attributes)
        key = channel[0] if channel else moves.name
        if i.name.startswith("async-collective-start"):
            stream.begun[key] = self._collective(moves, inner, stream)
        elif i.name.startswith("async-collective-done") and key in stream.begun:
            stream.wait(_begun(stream.begun.pop(key)))
        else:
            if key not in stream.begun:
                stream.wait(self._collective(moves, inner, stream))
            work = self._cost.work(i, inside)
            if work.flops:
                self._do(i, work, stream)

    def _collective(self, i: Instruction, inside: Computation, stream: _Stream) -> _Transfer:
        self._reached.add(i.name)
        c = read_collective(i, inside, self._mesh, self._fill)
        if c.kind == "all-reduce" and any(j.opcode == "dynamic-slice" and i.name in j.operands for j in inside):
            c = replace(c, kind="reduce-scatter", bytes=c.bytes / 2)  # a device keeps its part of the result
        return self._transfer(c, self._links.route(c), stream)

    def _transfer(self, c: Collective, route: Route, stream: _Stream) -> _Transfer:
        """Counts the collective on each of its links; its seconds go to the first, the outer one."""
        seconds = route.seconds / self._link_efficiency
        if c.kind == "ragged-all-to-all":
            seconds *= self._imbalance  # the fullest device's
        entries = []
        for link, sent in (route.bytes or {"none": 0.0}).items():
            entries.append(stream.line.moved.setdefault((c.kind, c.axes, link), Moved()))
            entries[-1].count += 1
            entries[-1].bytes += sent
        entries[0].seconds += seconds
        return stream.occupy(route.directions, seconds, c.kind, entries[0])

    def _begin(self, i: Instruction, inside: Computation, stream: _Stream) -> None:
        """The start of a collective, a SparseCore's work or a copy; those of one kind run one after the other.

        A SparseCore's work, collectives too, is a computation of its own, and starts once it has its operands.
        """
        if kind_of(i):
            stream.begun[i.name] = self._collective(i, inside, stream)
            return

        def begin() -> _Transfer:
            return self._elsewhere(i, inside, stream)

        stream.begun[i.name] = begin() if i.operands else begin

    def _elsewhere(self, i: Instruction, inside: Computation, stream: _Stream) -> _Transfer:
        kind = i.opcode.removesuffix("-start")
        called = next((c for key in ("calls", "to_apply", "called_computations") if (c := i.called(key))), None)
        inner = self._program.computations.get(called or "")
        if inner and (moves := next((j for j in inner if kind_of(j)), None)):
            return self._collective(moves, inner, stream)
        if inner:
            played = self._play(inner.name)
            stream.line.work = stream.line.work + played.work
            return stream.occupy((kind,), played.seconds, kind)
        copied = self._cost.copied(i, inside)
        stream.line.work = stream.line.work + Work(bytes=copied)
        return stream.occupy((kind,), copied / self._cost.memory, kind)

    def _end(self, i: Instruction, stream: _Stream) -> None:
        begun = stream.begun.pop(i.operands[0], None) if i.operands else None
        if begun is not None:  # a send ends with its receive
            stream.wait(_begun(begun))

    def _loop(self, i: Instruction, inside: Computation, stream: _Stream) -> None:
        body, line = i.called("body") or "", stream.line
        trips: float | None = self._program.trip_count(i, inside)
        if trips is None:
            trips = self._rounds(i, self._program.computations[body])
            if trips is None:
                line.refused.append(i.op_name or i.name)
                trips = 1
            else:
                line.assumed[_short(i.op_name)] = max(trips, line.assumed.get(_short(i.op_name), 0.0))
        stream.add(self._play(body), trips)


def _begun(transfer: "_Transfer | Callable[[], _Transfer]") -> _Transfer:
    return transfer if isinstance(transfer, _Transfer) else transfer()


def part_of(op_name: str) -> str:
    """The part of the model that an instruction belongs to, by the scopes in its name; "rest" if none is known."""
    scopes = set(re.split(r"[/()]", op_name))
    return next((part for part in PARTS if part in scopes), "rest")


def _short(op_name: str) -> str:
    """The last three scopes of a name."""
    return "/".join(op_name.split("/")[-3:])
