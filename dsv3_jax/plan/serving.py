"""`dsv3 plan --serve`: what an engine's steps take on devices that are not here.

The steps are the engine's own. Layers stand in them one by one, so programs with one dense and one MoE layer, with one MoE
layer more, and with one dense layer more are compiled, and figures go on as straight lines to the model's number of layers.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dsv3_jax.config import Config, ParallelConfig, config_to_dict, load_config
from dsv3_jax.cost.efficiency import ASSUMED, Efficiency
from dsv3_jax.cost.links import Links
from dsv3_jax.cost.topologies import GIB, Topology, mesh_label, parse_topology
from dsv3_jax.errors import UserError
from dsv3_jax.plan.compile import SERVING, Compiled, Limits, compile_by
from dsv3_jax.plan.hlo import Computation, Instruction
from dsv3_jax.plan.progress import progress
from dsv3_jax.plan.roofline import CostModel
from dsv3_jax.plan.timeline import Player
from dsv3_jax.plan.weights import moved_weights

ACCEPTANCE = 0.85  # of drafts: DeepSeek's 671B, 0.85 to 0.90 (arXiv 2412.19437, section 5.4.3)
PIECE = 64  # tokens of a prompt that every device fills in at once
BLOCK = 256  # positions that attention reads at a time (serve/attend.py)
PUBLISHED = "published: sglang-jax, 64 v6e, 16 streams: 249 output tokens/s, gaps p50 34.5 ms"
_BLOCKS = "grouped_swiglu_blocked"
Say = Callable[[str, float, float], None]


@dataclass(frozen=True)
class Load:
    """What is served: `batch` sequences at once, each `context` tokens long."""

    batch: int
    context: int
    drafts: bool


@dataclass
class ServingPlan:
    """Figures of a device, in bytes and seconds. plan.json holds these fields."""

    name: str
    topology: str
    mesh: dict[str, int]
    load: dict[str, Any]
    compiled_layers: list[tuple[int, int]]  # (dense, MoE) of the programs that figures come from
    memory: dict[str, float]  # weights, cache, temporaries, other, total, and room for them
    cache_bytes_a_token: float  # over all devices
    steps: dict[str, dict[str, Any]]  # by name: seconds, bytes, collectives, tokens/s
    moved_weights: list[str]
    notes: list[str]

    @property
    def fits(self) -> bool:
        return self.memory["total"] <= self.memory["room"]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"fits": self.fits}


def mesh_for(config: Config, topology: Topology, overrides: tuple[str, ...]) -> Config:
    """`config` with a mesh of all devices: the one that overrides name, or experts over as many as divide them."""
    if any(o.startswith("parallel.") for o in overrides):
        return config
    expert = math.gcd(topology.size, config.model.n_routed_experts)
    return replace(config, parallel=ParallelConfig(expert=expert, tensor=topology.size // expert))


def plan_serving(
    config: Config, name: str, load: Load, limits: Limits, options: dict[str, Any], say: Say, efficiency: Efficiency = ASSUMED
) -> ServingPlan:
    """Compile (or read from the cache) and count. Raises `UserError` for bad input, and if the compiler fails."""
    topology = parse_topology(name)
    if load.batch % topology.size:
        raise UserError(f"--batch={load.batch} is not as many on each of {topology.size} devices; use a multiple of them")
    if not 2 <= load.context <= config.model.max_position_embeddings:
        raise UserError(f"--context={load.context} is out of range; use 2 to {config.model.max_position_embeddings}")
    if load.drafts and not config.model.num_nextn_predict_layers:
        raise UserError("--drafts needs an MTP module: model.num_nextn_predict_layers is 0")
    shapes = {"decode": _shape(True, load.batch, 1, False)}
    if load.drafts:
        shapes["decode with drafts"] = _shape(True, load.batch, 2, True)
    shapes["fill"] = _shape(False, topology.size, PIECE, load.drafts)
    m, found, moved, notes = config.model, {}, [], []
    layers = _layers_to_compile(m.num_hidden_layers, m.first_k_dense_replace)
    for step, shape in shapes.items():
        measured = []
        for dense, moe in layers:
            cut = replace(config, model=replace(m, num_hidden_layers=dense + moe, first_k_dense_replace=dense))
            request = {
                "config": config_to_dict(cut), "topology": name, "options": options, "shape": shape, "slots": load.batch,
                "context": load.context,
            }  # fmt: skip
            compiled = compile_by(SERVING, request, limits, say)
            measured.append(measure(compiled, load, efficiency))
            if step.startswith("decode"):
                moved += [f"{step}: {c} moves {', '.join(sorted(w))}" for c, w in moved_weights(compiled.program).items()]
            notes += [n for n in _notes(step, compiled, measured[-1]) if n not in notes]
        found[step] = measured[0] if len(measured) == 1 else extended(m.first_k_dense_replace, m.num_moe_layers, *measured)
    return _plan(config, topology, compiled.mesh, load, layers, found, moved, notes)


def _shape(decodes: bool, sequences: int, length: int, drafts: bool) -> dict[str, Any]:
    return {"decodes": decodes, "sequences": sequences, "length": length, "drafts": drafts}


def _layers_to_compile(layers: int, dense: int) -> list[tuple[int, int]]:
    few = layers <= 4 or not 0 < dense < layers
    return [(dense, layers - dense)] if few else [(1, 1), (1, 2), (2, 1)]


def measure(compiled: Compiled, load: Load, efficiency: Efficiency) -> dict[str, Any]:
    """A program's figures on one device; conditionals take their shortest branch: greedy, no log-probabilities."""
    topology, program, memory = compiled.topology, compiled.program, compiled.memory
    cost = CostModel(program, topology.kind, efficiency, 1.0)

    def rounds(loop: Instruction, body: Computation) -> float | None:
        if _BLOCKS in loop.op_name:  # a block an expert, and among many tokens every expert has one
            return float(next(a.dims[0] for a in loop.arrays if len(a.dims) == 3))
        return math.ceil(load.context / BLOCK) if loop.op_name.endswith("shard_map/while") else None

    player = Player(
        program, compiled.mesh, Links(topology.kind, compiled.locations, topology.shape), cost, efficiency.link, 1.0, 1.0,
        rounds, min,
    )  # fmt: skip
    line = player.play()
    used = compiled.state["weights"] - (0 if load.drafts else compiled.state["mtp"])
    return {
        "weights": compiled.state["weights"], "weights read": used, "cache": compiled.state["cache"],
        "temporaries": memory["temp"] + max(memory["output"] - memory["alias"], 0),
        "bytes": line.work.bytes, "memory seconds": line.work.bytes / cost.memory,
        "seconds": line.seconds, "communication": line.communication, "exposed": line.exposed,
        "moved": {f"{kind} {' x '.join(axes)} {link}": asdict(m) for (kind, axes, link), m in line.moved.items()},
        "refused": line.refused,
    }  # fmt: skip


def extended(dense: int, moe: int, base: Any, with_moe: Any, with_dense: Any) -> Any:
    """Figures of `dense` and `moe` layers from those of (1, 1), (1, 2) and (2, 1); dictionaries entry by entry."""
    if isinstance(base, dict):
        three = base, with_moe, with_dense
        keys = dict.fromkeys([*base, *with_moe, *with_dense])
        return {k: extended(dense, moe, *(f.get(k, _zero(k, three)) for f in three)) for k in keys}
    if not isinstance(base, int | float):
        return base
    return base + (dense - 1) * (with_dense - base) + (moe - 1) * (with_moe - base)


def _zero(key: str, programs: tuple[dict[str, Any], ...]) -> Any:
    """Nothing, in the form that the figure has in another program."""
    example = next(f[key] for f in programs if key in f)
    return dict.fromkeys(example, 0.0) if isinstance(example, dict) else 0.0


def _notes(step: str, compiled: Compiled, figures: dict[str, Any]) -> list[str]:
    notes = [f"{step}: loop of unknown length, counted once: {name}" for name in figures["refused"]]
    return notes + ([] if compiled.program.scheduled else [f"{step}: the program is not scheduled: nothing overlaps"])


def _plan(
    config: Config, topology: Topology, mesh: dict[str, int], load: Load, layers: list[tuple[int, int]],
    found: dict[str, Any], moved: list[str], notes: list[str],
) -> ServingPlan:  # fmt: skip
    m, decode = config.model, found["decode"]
    itemsize = 2 if config.precision.recipe == "bf16" else 4
    a_token = (m.num_hidden_layers + min(m.num_nextn_predict_layers, 1)) * (m.kv_lora_rank + m.qk_rope_head_dim) * itemsize
    memory = {
        "weights": decode["weights"], "cache": decode["cache"], "temporaries": max(f["temporaries"] for f in found.values())
    }  # fmt: skip
    memory |= {"total": sum(memory.values()), "room": topology.room}
    memory["total, weights in 8 bits"] = memory["total"] - memory["weights"] / 2
    steps = {}
    for name, f in found.items():
        read = load.batch / topology.size * load.context * a_token if name != "fill" else 0.0
        tokens = topology.size * PIECE if name == "fill" else load.batch * (1 + ACCEPTANCE * ("drafts" in name))
        half = f["weights read"] / 2 / (f["bytes"] / f["memory seconds"])  # what half of the weights takes to read
        steps[name] = {
            "seconds": f["seconds"], "bytes": f["bytes"], "weights and cache": f["weights read"] + read,
            "ratio": f["bytes"] / (f["weights read"] + read), "memory seconds": f["memory seconds"],
            "communication": f["communication"], "exposed": f["exposed"], "tokens/s": tokens / f["seconds"],
            "tokens/s, weights in 8 bits": tokens / max(f["seconds"] - half, f["communication"]), "collectives": f["moved"],
        }  # fmt: skip
    return ServingPlan(
        config.name, str(topology), mesh, asdict(load), layers, memory, float(a_token), steps, moved, notes
    )  # fmt: skip


def show_serving(plan: ServingPlan, console: Console) -> None:
    """Print everything about one topology."""
    load, memory = plan.load, plan.memory
    console.rule(f"serving {plan.name} on {plan.topology}")
    console.print(
        f"{mesh_label(plan.mesh)}; {load['batch']} sequences of {load['context']:,}; compiled: programs of "
        f"{', '.join(f'{d} dense and {m} MoE layers' for d, m in plan.compiled_layers)}"
        f"{'; the rest is extrapolated, layer by layer' if len(plan.compiled_layers) > 1 else ''}", soft_wrap=True,
    )  # fmt: skip
    gib = {name: f"{size / GIB:.2f}" for name, size in memory.items()}
    console.print(
        f"{'fits' if plan.fits else 'DOES NOT FIT'}: {gib['total']} of {gib['room']} GiB a device: weights {gib['weights']}, "
        f"cache {gib['cache']}, temporaries {gib['temporaries']}; with weights in 8 bits "
        f"{gib['total, weights in 8 bits']} (arithmetic); {plan.cache_bytes_a_token:,.0f} bytes of cache a token",
        style="bold green" if plan.fits else "bold red", soft_wrap=True,
    )  # fmt: skip
    for name, step in plan.steps.items():
        _show_step(name, step, console)
    console.print(f"drafts: assumed accepted {ACCEPTANCE:.0%}. {PUBLISHED}", soft_wrap=True)
    console.print("; ".join(plan.moved_weights) if plan.moved_weights else "no collective of a decoding step carries a weight")
    for note in plan.notes:
        console.print(f"note: {note}", soft_wrap=True)


def _show_step(name: str, step: dict[str, Any], console: Console) -> None:
    table = Table("collective, axes, link", "count", "MB sent", "ms", title=name, title_justify="left", min_width=60)
    for what, moved in sorted(step["collectives"].items(), key=lambda item: -item[1]["seconds"]):
        table.add_row(what, f"{moved['count']:,.0f}", f"{moved['bytes'] / 1e6:.2f}", f"{moved['seconds'] * 1e3:.3f}")
    console.print(table)
    ms = {what: f"{step[what] * 1e3:.1f} ms" for what in ("seconds", "memory seconds", "communication")}
    console.print(
        f"{name}: {ms['seconds']}, {step['tokens/s']:,.0f} tokens/s ({step['tokens/s, weights in 8 bits']:,.0f} with weights "
        f"in 8 bits, by arithmetic); bytes accessed {step['bytes'] / 1e9:.2f} GB, {step['ratio']:.2f} x (weights and "
        f"cache read), {ms['memory seconds']}; collectives {ms['communication']}, "
        f"{step['communication'] / step['memory seconds']:.2f} of it", soft_wrap=True,
    )  # fmt: skip


def run_serving(
    config: Path, overrides: tuple[str, ...], topologies: tuple[str, ...], out: Path | None, load: Load, limits: Limits,
    options: dict[str, Any], console: Console,
) -> None:  # fmt: skip
    """Plan for each topology, print, and write plan.json. Raises `UserError` for bad input."""
    plans = []
    for name in topologies:
        asked = mesh_for(load_config(config, overrides), parse_topology(name), overrides)
        with progress(name) as say:
            plans.append(plan_serving(asked, name, load, limits, options, say))
        show_serving(plans[-1], console)
    directory = out or Path("plans") / f"{plans[-1].name}-serving"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "plan.json").write_text(json.dumps({"plans": [p.to_dict() for p in plans]}, indent=1) + "\n")
    console.print(f"wrote {directory / 'plan.json'}")
