"""`dsv3 plan`: what the verb does, in order."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dsv3_jax.config import load_config
from dsv3_jax.errors import UserError
from dsv3_jax.plan.compile import Limits
from dsv3_jax.plan.figures import Assumptions, plan_step
from dsv3_jax.plan.page import page
from dsv3_jax.plan.report import compare, show
from dsv3_jax.plan.topologies import EXAMPLES, parse_topology
from dsv3_jax.plan.trace import Overlap, overlaps
from dsv3_jax.precision.platforms import HARDWARE

_LINE_EVERY_S = 10.0


def list_topologies(console: Console) -> None:
    table = Table("kind", "examples", "bf16, 10^12/s", "GiB", "links, GB/s one way", title="topologies; facts are of a device")
    for kind, examples in EXAMPLES.items():
        facts = HARDWARE[kind]
        links = ", ".join(f"{name} {link['gb_s']:g}" for name, link in facts["links"].items())
        table.add_row(kind, " ".join(examples), f"{facts['tera_ops']['bf16']:g}", f"{facts['memory_gib']:g}", links)
    console.print(table)
    console.print(
        "TPU names give the torus of a slice, GPU names HOSTSxGPUS; N*v5p:8x8x8 are N slices. Any shape will do that the "
        "compiler takes."
    )


@contextmanager
def _progress(topology: str) -> Iterator[Callable[[str, float, float], None]]:
    """What the compiler is doing: a line that moves on a terminal, one every few seconds in a pipe."""
    console, last = Console(stderr=True, highlight=False), [time.monotonic(), ""]
    if console.is_terminal:
        with console.status(f"{topology}: starting") as status:
            yield lambda phase, s, gb: status.update(f"{topology}: {phase}, {s:.0f} s, {gb:.1f} GB")
        return

    def line(phase: str, seconds: float, gb: float) -> None:
        if phase != last[1] or time.monotonic() - last[0] >= _LINE_EVERY_S:
            last[:] = time.monotonic(), phase
            print(f"{topology}: {phase}, {seconds:.0f} s, {gb:.1f} GB", file=sys.stderr, flush=True)

    yield line


def run_plan(
    config: Path, overrides: tuple[str, ...], topologies: tuple[str, ...], out: Path | None, imbalance: float,
    price: float | None, memory_gb: float, timeout_s: float, console: Console,
) -> None:  # fmt: skip
    """Compile for each topology, print, and write plan.json and plan.html. Raises `UserError` for bad input."""
    if imbalance < 1:
        raise UserError(f"--imbalance={imbalance}: the fullest device has at least the mean; use 1 or more")
    if price is not None and price < 0:
        raise UserError(f"--price={price} must not be negative")
    for topology in topologies:
        parse_topology(topology)
    checked = load_config(config, overrides)
    assume, limits, plans = Assumptions(imbalance, price), Limits(memory_gb, timeout_s), []
    for topology in topologies:
        with _progress(topology) as say:
            plans.append(plan_step(checked, topology, assume, limits, {}, say))
        show(plans[-1], console)
    if len(plans) > 1:
        compare(plans, console)
    directory = out or Path("plans") / checked.name
    directory.mkdir(parents=True, exist_ok=True)
    found = {"plans": [p.to_dict() for p in plans]}
    (directory / "plan.json").write_text(json.dumps(found, indent=1) + "\n")
    (directory / "plan.html").write_text(page(plans))
    console.print(f"wrote {directory / 'plan.json'} and {directory / 'plan.html'}")


def show_overlap(trace: Path, plan: Path | None, console: Console) -> None:
    """A row a device, and the plans' figures. Raises `UserError` for what is no trace, or no plan."""
    planned = _planned(plan) if plan else []
    found = overlaps(trace)
    table = Table("device", "work s", "communication s", "hidden s", "hidden", title="communication behind work")
    for o in found:
        table.add_row(o.device, f"{o.work:.3f}", f"{o.communication:.3f}", f"{o.hidden:.3f}", _percent(o.share))
    console.print(table)
    for kind in sorted({kind for o in found for kind in o.by_kind}):
        seconds, hidden = (sum(o.by_kind.get(kind, (0.0, 0.0))[n] for o in found) for n in (0, 1))
        console.print(f"{kind}: {seconds:.3f} s of all devices, {_percent(hidden / seconds if seconds else None)} hidden")
    console.print(f"all devices: {_percent(_together(found))} hidden (goal: more than 70%)")
    for topology, share in planned:
        console.print(f"planned for {topology}: {_percent(share)}")


def _percent(share: float | None) -> str:
    return "no communication" if share is None else f"{share:.1%}"


def _together(found: list[Overlap]) -> float | None:
    seconds = sum(o.communication for o in found)
    return sum(o.hidden for o in found) / seconds if seconds else None


def _planned(plan: Path) -> list[tuple[str, float | None]]:
    try:
        return [(p["topology"], p["step"].get("hidden")) for p in json.loads(plan.read_text())["plans"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--plan={plan} is no plan.json of dsv3 plan: {error}") from None
