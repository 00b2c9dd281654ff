"""`dsv3 plan` and `dsv3 overlap`: what the verbs do, in order."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dsv3_jax.config import Config, load_config
from dsv3_jax.cost.division import no_mesh
from dsv3_jax.cost.estimate import Candidate
from dsv3_jax.cost.feasible import feasible_worker_counts
from dsv3_jax.cost.memory import state_bytes_per_device
from dsv3_jax.cost.topologies import GIB, mesh_label, parse_topology
from dsv3_jax.errors import UserError
from dsv3_jax.files import read_json
from dsv3_jax.plan.compile import Limits
from dsv3_jax.plan.figures import Assumptions, Plan, plan_step
from dsv3_jax.plan.page import page
from dsv3_jax.plan.progress import progress
from dsv3_jax.plan.report import compare, show
from dsv3_jax.plan.search import explain, search
from dsv3_jax.plan.trace import Overlap, overlaps
from dsv3_jax.precision.platforms import HARDWARE, platforms
from dsv3_jax.records import number
from dsv3_jax.yaml_reader import parse_yaml

_LARGEST_PLAN = 2**28  # bytes of plan.json


def list_topologies(console: Console) -> None:
    """Print the kinds of devices that can be planned for, with examples and their main figures."""
    columns = "kind", "examples", "bf16,\n10^12/s", "GiB", "links, GB/s\none way"
    table = Table(*columns, title="topologies; figures per device")
    for column in table.columns[2:]:
        column.no_wrap = True  # the examples are what 80 columns have no room for
    for kind, facts in HARDWARE.items():
        links = ",\n".join(f"{name} {link['gb_s']:g}" for name, link in facts["links"].items())
        table.add_row(kind, " ".join(facts["topologies"]), f"{facts['tera_ops']['bf16']:g}", f"{facts['memory_gib']:g}", links)
    console.print(table)
    console.print(
        "TPU names give the torus of a slice, GPU names HOSTSxGPUS; N*v5p:8x8x8 means N slices. Any other shape works that the "
        "compiler accepts."
    )


def list_worker_counts(config: Config, workers: range, devices: int, console: Console) -> None:
    """Print which numbers of `workers`, with `devices` each, a run can use, and their meshes. Raises `UserError` if none."""
    feasible = feasible_worker_counts(config, devices, workers)
    if not feasible:
        raise no_mesh(config, workers, devices)
    columns = "workers", "devices", "mesh", "training state, GiB per device", "rows per device"
    table = Table(*columns, title="feasible numbers of workers")
    for count, sizes in reversed(feasible.items()):
        rows = config.data.batch_size / (sizes["data"] * sizes["fsdp"] * sizes["expert"])
        state = state_bytes_per_device(config, sizes) / GIB
        table.add_row(str(count), str(count * devices), mesh_label(sizes), f"{state:.3g}", f"{rows:g}")
    console.print(table)


def compiler_options(given: tuple[str, ...]) -> dict[str, Any]:
    """XLA's options by name; values as YAML reads them, because XLA expects true and not 'true'. Raises `UserError`."""
    found = {}
    for option in given:
        name, sign, value = option.partition("=")
        if not sign or not name:
            raise UserError(f"--xla {option}: use NAME=VALUE")
        found[name.lstrip("-")] = parse_yaml(value, f"--xla {option}")
    return found


@dataclass(frozen=True)
class Request:
    """The arguments of `dsv3 plan`. Raises `UserError` for a bad topology, price or compiler option."""

    config: Path
    overrides: tuple[str, ...]
    topologies: tuple[str, ...]
    out: Path | None
    assume: Assumptions
    limits: Limits
    xla: tuple[str, ...] = ()

    @property
    def options(self) -> dict[str, Any]:
        return compiler_options(self.xla)

    def __post_init__(self) -> None:
        if self.assume.price is not None and not 0 <= self.assume.price < math.inf:
            raise UserError(f"--price={self.assume.price} must be a price of 0 or more")
        for topology in self.topologies:
            parse_topology(topology)


def _compile(request: Request, config: Config, topology: str) -> Plan:
    with progress(topology) as say:
        return plan_step(config, topology, request.assume, request.limits, request.options, say)


def run_plan(request: Request, console: Console) -> None:
    """Compile for each topology, print the plans, and write plan.json and plan.html. Raises `UserError` for bad input."""
    config, plans = load_config(request.config, request.overrides), []
    for topology in request.topologies:
        plans.append(_compile(request, config, topology))
        show(plans[-1], console)
    if len(plans) > 1:
        compare(plans, console)
    _write(request, config, plans, console)


def run_search(request: Request, compiled: int, console: Console) -> None:
    """Rank every mesh by arithmetic, compile the best `compiled`, and explain the winner.

    Prints, and writes the plans of those compiled. Raises `UserError` for bad input, or if none compiles.
    """
    config = load_config(request.config, request.overrides)
    for name in request.topologies:
        topology = parse_topology(name)
        auto = next(p for p in platforms() if p.name == topology.platform).auto[0]
        ranked = search(config, topology, request.assume.efficiency, tuple(dict.fromkeys(("bf16", auto))))
        table = Table("mesh", "GiB", "work s", "communication s", "occupancy", "step s", title=f"{name}: estimated")
        for c in ranked[:10]:
            sent = f"{sum(c.communication.values()):.2f}"
            table.add_row(c.label, f"{c.memory / GIB:.0f}", f"{c.work:.2f}", sent, f"{c.occupancy:.0%}", f"{c.seconds:.2f}")
        console.print(table)
        console.print(
            f"{len(ranked):,} combinations fit by estimate; compiling {min(compiled, len(ranked))} of different meshes"
        )
        tried: list[tuple[Candidate, Plan]] = []
        for candidate in _different(ranked, compiled):
            try:
                tried.append((candidate, _compile(request, candidate.config, name)))
            except UserError as error:
                console.print(f"{candidate.label}: {error}", soft_wrap=True)
        tried.sort(key=lambda pair: (not pair[1].fits, pair[1].step["seconds"]))
        if not tried:
            raise UserError(f"topology={name}: none of the {compiled} best compiles; see above")
        compare([plan for _, plan in tried], console)
        (winner, best), *others = tried
        console.print(f"best: {winner.label}", soft_wrap=True)
        if others:
            console.print(f"against {others[0][0].label}: {explain(winner, others[0][0])} (estimated)", soft_wrap=True)
        show(best, console)
        _write(request, config, [plan for _, plan in tried], console)


def _different(ranked: list[Candidate], count: int) -> list[Candidate]:
    """The best candidate of each of the best `count` meshes: neighbours on the list differ in little."""
    best: dict[tuple[int, ...], Candidate] = {}
    for candidate in ranked:
        best.setdefault(tuple(candidate.sizes.values()), candidate)
    return list(best.values())[:count]


def _write(request: Request, config: Config, plans: list[Plan], console: Console) -> None:
    directory = request.out or Path("plans") / config.name
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "plan.json").write_text(json.dumps({"plans": [p.to_dict() for p in plans]}, indent=1) + "\n")
    (directory / "plan.html").write_text(page(plans))
    console.print(f"wrote {directory / 'plan.json'} and {directory / 'plan.html'}")


def show_overlap(trace: Path, plan: Path | None, console: Console) -> None:
    """Print how much communication each device of a trace hid behind work, beside a plan.json's figures.

    Raises `UserError` if `trace` is no trace, or `plan` no plan.json.
    """
    planned = _planned(plan) if plan else []
    found = overlaps(trace)
    table = Table("device", "work s", "communication s", "hidden s", "hidden", title="communication behind work")
    for o in found:
        table.add_row(o.device, f"{o.work:.3f}", f"{o.communication:.3f}", f"{o.hidden:.3f}", _percent(o.share))
    console.print(table)
    for kind in sorted({kind for o in found for kind in o.by_kind}):
        seconds, hidden = (sum(o.by_kind.get(kind, (0.0, 0.0))[n] for o in found) for n in (0, 1))
        console.print(f"{kind}: {seconds:.3f} s of all devices, {_percent(hidden / seconds if seconds else None)} hidden")
    console.print(f"all devices: {_percent(_together(found))} hidden")
    for topology, share in planned:
        console.print(f"planned for {topology}: {_percent(share)}")


def _percent(share: float | None) -> str:
    return "no communication" if share is None else f"{share:.1%}"


def _together(found: list[Overlap]) -> float | None:
    seconds = sum(o.communication for o in found)
    return sum(o.hidden for o in found) / seconds if seconds else None


def _planned(plan: Path) -> list[tuple[str, float | None]]:
    try:
        return [(str(p["topology"]), _hidden(p["step"])) for p in read_json(plan, _LARGEST_PLAN)["plans"]]
    except (LookupError, TypeError, AttributeError):
        raise UserError(f"--plan={plan} is no plan.json of dsv3 plan, which holds plans with a topology and a step") from None


def _hidden(step: dict[str, Any]) -> float | None:
    """The share of communication that a plan's step hides. Raises `TypeError` for what is none."""
    if step.get("hidden") is None:
        return None
    if math.isnan(share := number(step, "hidden", math.nan)):
        raise TypeError
    return share
