"""`dsv3 overlap`: how much of a real run's communication was hidden behind work, from a trace of `jax.profiler`.

A device's communication is the union of its collectives' intervals, for an asynchronous one from its start to its end; its work
is the union of the intervals of all other instructions, without loops and calls. Hidden is what both have in common.
"""

import re
import warnings
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsv3_jax.errors import UserError
from dsv3_jax.files import open_regular
from dsv3_jax.plan.communication import KINDS

_COLLECTIVE = re.compile("|".join((*KINDS, "collective-broadcast")))
_LIBRARY = re.compile(r"ncclDevKernel_(\w+?)_", re.I)  # of GPUs, where kernels carry the library's names
_NCCL = {"allgather": "all-gather", "allreduce": "all-reduce", "reducescatter": "reduce-scatter", "sendrecv": "all-to-all"}
_PRIMITIVES = {  # JAX's, which name the instructions that they become
    "psum": "all-reduce", "pmax": "all-reduce", "pmin": "all-reduce", "psum-scatter": "reduce-scatter",
    "ppermute": "collective-permute",
}  # fmt: skip
_NO_WORK = re.compile(r"^(while|conditional|call|tuple|.*-done|.*-update)$")
Intervals = np.ndarray  # f64[N, 2]: begin and end in seconds, ascending, not overlapping


@dataclass
class Device:
    """Intervals (begin, end) in seconds of one device in a trace; communication by kind."""

    work: list[tuple[float, float]] = field(default_factory=list)
    communication: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))


@dataclass(frozen=True)
class Overlap:
    """Seconds of one device's work and communication, and of both at once."""

    device: str
    work: float
    communication: float
    hidden: float  # communication behind work
    by_kind: dict[str, tuple[float, float]]  # communication and its hidden part, by kind of collective

    @property
    def share(self) -> float | None:
        """Share of the communication that is hidden; None without any."""
        return self.hidden / self.communication if self.communication else None


def union(intervals: Iterable[tuple[float, float]]) -> Intervals:
    """The intervals merged where they overlap, in order."""
    merged: list[list[float]] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([begin, end])
    return np.array(merged).reshape(-1, 2)


def length(a: Intervals) -> float:
    """Seconds in all intervals."""
    return float((a[:, 1] - a[:, 0]).sum())


def common(a: Intervals, b: Intervals) -> float:
    """Seconds that lie in intervals of both."""
    total, i, j = 0.0, 0, 0
    while i < len(a) and j < len(b):
        total += max(0.0, min(a[i, 1], b[j, 1]) - max(a[i, 0], b[j, 0]))
        if a[i, 1] < b[j, 1]:
            i += 1
        else:
            j += 1
    return float(total)


def opcode_of(event: str) -> str:
    """The opcode in an event's name, which is an instruction's text (TPU), its name alone (CPU), or a kernel's name (GPU)."""
    name, _, text = event.partition(" = ")
    found = re.search(r" ([a-z][\w\-]*)\(", text)
    return found[1] if found else re.sub(r"[.\d]+$", "", name.lstrip("%")).replace("_", "-")


def kind_of_event(event: str) -> str | None:
    """The kind of collective that an event is, or is the start or end of; None for anything else."""
    opcode = opcode_of(event)
    if found := _COLLECTIVE.match(opcode):
        return found[0]
    library = _LIBRARY.search(event)
    if library:
        return _NCCL.get(library[1].lower(), "all-reduce")
    return _PRIMITIVES.get(opcode)


def _leaves(events: list[tuple[str, float, float]]) -> list[tuple[str, float, float]]:
    """The events without those that contain others, such as loops and calls."""
    found, open_ = [], []
    for event in sorted(events, key=lambda e: (e[1], -e[2])):
        while open_ and open_[-1][0][2] <= event[1]:
            parent, has_child = open_.pop()
            if not has_child:
                found.append(parent)
        if open_ and event[2] <= open_[-1][0][2]:
            open_[-1][1] = True
        open_.append([event, False])
    return found + [event for event, has_child in open_ if not has_child]


def _add(device: Device, events: list[tuple[str, float, float]]) -> None:
    """Add the events (name, begin, end) of a line of the trace. The start and end of a collective are one interval."""
    begun: dict[str, list[float]] = defaultdict(list)
    for name, begin, end in _leaves(events):
        kind = kind_of_event(name)
        opcode = opcode_of(name)
        if kind and opcode.endswith("start"):
            begun[kind].append(begin)
        elif kind and opcode.endswith("done"):
            device.communication[kind].append((begun[kind].pop(0) if begun[kind] else begin, end))
        elif kind:
            device.communication[kind].append((begin, end))
        elif not _NO_WORK.match(opcode):
            device.work.append((begin, end))


def read_devices(profile: Any, label: str) -> dict[str, Device]:
    """The devices of a profile by name: planes of accelerators, and on CPU threads' events by the device they worked for."""
    devices: dict[str, Device] = defaultdict(Device)
    for plane in profile.planes:
        accelerator = re.match(r"/device:(TPU|GPU|CUSTOM)", plane.name)
        if not accelerator and plane.name != "/host:CPU":
            continue
        for line in plane.lines:
            if accelerator and line.name in ("Steps", "XLA Modules", "Framework Ops", "XLA TraceMe", "Source code"):
                continue
            by_device: dict[str, list[tuple[str, float, float]]] = defaultdict(list)
            for e in line.events:
                stats = {} if accelerator else dict(e.stats)
                if accelerator or "hlo_op" in stats:
                    device = plane.name if accelerator else f"CPU {stats.get('device_ordinal', 0)}"
                    by_device[f"{label}{device}"].append((e.name, e.start_ns / 1e9, e.end_ns / 1e9))
            for device, events in by_device.items():
                _add(devices[device], events)
    return devices


def _read(file: Path, label: str) -> dict[str, Device]:
    """The devices of one .xplane.pb. Raises `UserError` if it is none, or damaged."""
    with open_regular(file) as opened, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the reader's own types; as an error it would abort
        try:
            profile = jax.profiler.ProfileData(opened.read())  # `from_file` aborts where this raises
            return read_devices(profile, label)
        except (
            OSError,
            RuntimeError,
            ValueError,
            TypeError,
            LookupError,
        ) as error:  # of the reader, for what damage looks like
            raise UserError(f"{file} is no trace of jax.profiler, or damaged: {error}") from None


def overlaps(trace: Path) -> list[Overlap]:
    """The overlap on every device of a trace: a directory that `jax.profiler` wrote, or one .xplane.pb. Raises `UserError`."""
    files = [trace] if trace.is_file() else sorted(trace.rglob("*.xplane.pb"))
    if not files:
        raise UserError(f"{trace} has no trace of jax.profiler: no *.xplane.pb in it")
    found = []
    for number, file in enumerate(files):
        for name, d in sorted(_read(file, f"{number}: " if len(files) > 1 else "").items()):
            work = union(d.work)
            kinds = {k: union(d.communication[k]) for k in KINDS if k in d.communication}
            everything = union(i for intervals in d.communication.values() for i in intervals)
            by_kind = {k: (length(a), common(a, work)) for k, a in kinds.items()}
            found.append(Overlap(name, length(work), length(everything), common(everything, work), by_kind))
    if not found:
        raise UserError(f"{trace} has no instructions of a compiled program; trace steps after the first")
    return found
