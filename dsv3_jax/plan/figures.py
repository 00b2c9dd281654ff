"""The figures of a plan: memory, FLOPs, communication, step time and a run's cost, each with its source."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from dsv3_jax.config import Config
from dsv3_jax.cost.compression import estimate_exchanges
from dsv3_jax.cost.efficiency import ASSUMED, Efficiency
from dsv3_jax.cost.estimate import pipeline_occupancy
from dsv3_jax.cost.links import Links
from dsv3_jax.model.counts import training_flops_per_token
from dsv3_jax.parallel.experts import SLACK
from dsv3_jax.plan.compile import Compiled, Limits, compile_step
from dsv3_jax.plan.hlo import Program
from dsv3_jax.plan.imbalance import BALANCED, Imbalance
from dsv3_jax.plan.roofline import CostModel
from dsv3_jax.plan.rounds import rounds_of
from dsv3_jax.plan.timeline import Player, Timeline
from dsv3_jax.precision.platforms import HARDWARE

SOURCES = {
    "memory": "compiler (memory_analysis); the split of temporaries is counted: gradients from their shards, activations from "
    "what the loops over layers stack",
    "flops": "count: products in the compiled program, loops times their rounds; kernels' from shapes or as they state",
    "useful_flops": "count from the configuration (model/counts.py)",
    "communication": "bytes and counts: the compiled program; seconds: model (hardware.yaml)",
    "across_data": "model (hardware.yaml): messages' latency, and bytes over the slowest link; no schedule",
    "step": "model: the compiled schedule played through with rooflines (plan/timeline.py)",
}


# Classes of memory whose key in plan.json is not what people read.
CLASSES = {
    "owed to the exchange": "error feedback of compressed gradients",
    "results that are not taken over": "results not aliased",
}


@dataclass(frozen=True)
class Assumptions:
    """What a plan takes as given."""

    imbalance: Imbalance = BALANCED  # of the rows that devices get for their experts
    price: float | None = None  # per device and hour
    efficiency: Efficiency = ASSUMED


@dataclass
class Plan:
    """Figures per device and step unless they say otherwise, in bytes, seconds and FLOPs. plan.json holds these fields."""

    name: str
    topology: str
    devices: int
    mesh: dict[str, int]
    precision: str
    remat: str
    batch: dict[str, int]
    memory: dict[str, float]  # bytes by class; `total`, and `room` for what a program may use, are among them
    flops: dict[str, float]  # executed, by format of the operands
    useful_flops: float
    recomputed: float
    communication: list[dict[str, Any]]
    across_data: list[dict[str, Any]]  # ways for gradients to cross `data`: algorithm, seconds, whether this step takes it
    step: dict[str, float]  # seconds, tokens/s, MFU
    parts: dict[str, float]  # seconds of work by part of the model
    pipeline_occupancy: float | None
    run: dict[str, float]  # of the whole training: tokens, days, device-hours, cost
    assumed: dict[str, Any]
    notes: list[str]
    compiled: dict[str, Any]
    sources: dict[str, str] = field(default_factory=lambda: SOURCES)

    @property
    def fits(self) -> bool:
        return self.memory["total"] <= self.memory["room"]

    @property
    def hidden(self) -> float | None:
        """Share of the communication's time that is hidden behind work; None without any."""
        return self.step.get("hidden")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"fits": self.fits}


def kept_bytes(program: Program) -> float:
    """Bytes of activations kept for the backward pass: what forward loops over layers stack, one entry per iteration."""
    total = 0.0
    entry = program.computations[program.entry]
    for loop in entry:
        trips = program.trip_count(loop, entry) if loop.opcode == "while" else None
        if not trips or trips < 2 or "transpose(" in loop.op_name or "jvp" not in loop.op_name:
            continue
        body = program.computations[loop.called("body") or ""]
        for number, (array, name) in enumerate(zip(loop.arrays, body.root.operands, strict=False)):
            result = body.instructions[name]
            carried = result.opcode == "get-tuple-element" and f"index={number}" in result.attributes
            if array.dims[:1] == (trips,) and not carried:
                total += array.bytes
    return total


def memory_of(compiled: Compiled, kept: float) -> dict[str, float]:
    """Bytes per device by class of memory; `kept` are those of activations (`kept_bytes`)."""
    m, state = compiled.memory, compiled.state
    gradients = float(state["parameters"])  # float32, as the master weights
    rest = m["temp"] - gradients - kept
    classes = {
        **{name: float(size) for name, size in state.items() if size},
        "batch": float(m["argument"] - sum(state.values())),
        "gradients": min(gradients, float(m["temp"])),
        "activations kept": min(kept, max(m["temp"] - gradients, 0.0)),
        "other temporaries": max(rest, 0.0),
        "results that are not taken over": float(m["output"] - m["alias"]),
    }
    total = float(m["argument"] + m["temp"] + m["output"] - m["alias"])
    return classes | {"total": total, "room": compiled.topology.room}


def _communication(line: Timeline) -> list[dict[str, Any]]:
    return [
        {"kind": kind, "axes": list(axes), "link": link, **asdict(moved)}
        for (kind, axes, link), moved in sorted(line.moved.items(), key=lambda item: -item[1].seconds)
    ]


def figures(config: Config, compiled: Compiled, assume: Assumptions = Assumptions()) -> Plan:
    """The plan of the compiled step of `config`."""
    topology, program, mesh = compiled.topology, compiled.program, compiled.mesh
    devices = math.prod(mesh.values())
    tokens, microbatches = config.data.batch_size * config.data.seq_len, config.train.grad_accum_steps
    imbalance = assume.imbalance.among(mesh["expert"], config.model.n_routed_experts)
    rounds = math.ceil(imbalance / SLACK)
    fill = 1 / SLACK / rounds  # of an exchange's buffers, in a round
    parts = config.parallel.expert_parts
    rows = tokens / devices * config.model.num_experts_per_tok / microbatches * imbalance / rounds / parts
    cost = CostModel(program, topology.kind, assume.efficiency, fill * imbalance)  # of the fullest device
    player = Player(
        program, mesh, Links(topology.kind, compiled.locations, topology.shape), cost, assume.efficiency.link, fill,
        imbalance, rounds_of(program, rows, rounds, parts),
    )  # fmt: skip
    line = player.play()
    useful = training_flops_per_token(config.model, config.data.seq_len) * tokens / devices
    peaks = HARDWARE[topology.kind]["tera_ops"]
    step = {
        "seconds": line.seconds, "work": line.work_seconds, "products": line.matmul_seconds, "memory": line.memory_seconds,
        "communication": line.communication, "exposed": line.exposed,
        "tokens_per_s": tokens / line.seconds, "tokens_per_s_device": tokens / line.seconds / devices,
        "mfu_bf16": useful / line.seconds / (peaks["bf16"] * 1e12),
        **({} if line.hidden is None else {"hidden": line.hidden}),
        **{f"waited for {what}": seconds for what, seconds in line.waited.items()},
    }  # fmt: skip
    notes = _notes(compiled, line, player.unreached(), cost.uncounted, useful)
    if assume.imbalance.skipped:
        notes.append(f"{assume.imbalance.source}: {assume.imbalance.skipped} damaged lines of routing.jsonl are left out")
    return Plan(
        name=config.name, topology=str(topology), devices=devices, mesh=mesh, precision=compiled.precision,
        remat=config.remat.policy,
        batch={"sequences": config.data.batch_size, "length": config.data.seq_len, "microbatches": microbatches},
        memory=memory_of(compiled, kept_bytes(program)), flops=dict(line.work.flops), useful_flops=useful,
        recomputed=line.recomputed, communication=_communication(line), step=step,
        across_data=[asdict(e) for e in estimate_exchanges(config, topology, mesh, assume.efficiency)],
        parts=dict(sorted(line.parts.items(), key=lambda item: -item[1])),
        pipeline_occupancy=pipeline_occupancy(config, mesh) if mesh["pipe"] > 1 else None,
        run=_run(config, line.seconds, devices, assume.price),
        assumed={
            "loops": line.assumed, "imbalance": imbalance, "price": assume.price, "efficiency": asdict(assume.efficiency)
        }, notes=notes,
        compiled={"seconds": compiled.seconds, "versions": compiled.versions},
    )  # fmt: skip


def _notes(compiled: Compiled, line: Timeline, unreached: list[str], uncounted: set[str], useful: float) -> list[str]:
    """Warnings: what is missing in the figures, and what is not as it should be."""
    notes = [compiled.exchange] if compiled.exchange else []
    notes += [f"a collective that the schedule does not reach is missing: {name}" for name in unreached]
    notes += [f"loop of unknown length, counted once, so that figures are too low: {name}" for name in line.refused]
    notes += [f"a kernel's FLOPs are not counted: {name}" for name in sorted(uncounted)]
    once = (line.work.flops.total() - line.recomputed) / useful
    if once > 1.5:
        notes.append(
            f"products do {once:.1f} times the useful FLOPs, without what is recomputed: look for experts' products that XLA "
            "made dense"
        )
    if not compiled.program.scheduled:
        notes.append("the program is not scheduled: overlap can't be read from it")
    if not compiled.topology.is_tpu:
        notes.append(
            "without a GPU XLA tunes nothing: its choice of kernels for matrix products (cuBLAS, Triton) is not that of a real "
            "run, and Triton kernels can't be compiled"
        )
    return notes


def _run(config: Config, step_seconds: float, devices: int, price: float | None) -> dict[str, float]:
    """Tokens, days, device-hours and cost of all steps, without failures."""
    seconds = step_seconds * config.train.steps
    hours = seconds / 3600 * devices
    found = {"tokens": float(config.train.steps * config.data.batch_size * config.data.seq_len)}
    found |= {"days": seconds / 86400, "device_hours": hours}
    return found | ({} if price is None else {"cost": hours * price})


def plan_step(
    config: Config, topology: str, assume: Assumptions, limits: Limits, options: dict[str, Any],
    say: Callable[[str, float, float], None],
) -> Plan:  # fmt: skip
    """Compile (or read from the cache) and count; arguments and errors as those of `compile_step`."""
    plan = figures(config, compile_step(config, topology, options, limits, say), assume)
    return replace(plan, compiled=plan.compiled | {"options": options})
