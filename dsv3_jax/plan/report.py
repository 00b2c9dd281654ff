"""Plans as text: one topology in full, several as a table."""

from rich.console import Console
from rich.table import Table

from dsv3_jax.cost.topologies import GIB, mesh_label
from dsv3_jax.plan.figures import CLASSES, Plan
from dsv3_jax.progress import human


def _share(part: float, total: float) -> str:
    return f"{part / total:.1%}" if total else "-"


def _table(title: str, source: str, *columns: str) -> Table:
    """An empty table; `source` says below it where its figures come from."""
    table = Table(title=title, title_justify="left", caption=f"({source})", caption_justify="left", min_width=60)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def verdict(plan: Plan) -> str:
    """One line: whether the step fits into a device's memory, and by how much."""
    total, room = plan.memory["total"] / GIB, plan.memory["room"] / GIB
    how = f"{room - total:.1f} GiB left" if plan.fits else f"{total - room:.1f} GiB too much"
    return f"{'fits' if plan.fits else 'DOES NOT FIT'}: {total:.1f} of {room:.1f} GiB per device, {how}"


def show(plan: Plan, console: Console) -> None:
    """Print everything about one topology."""
    step, batch = plan.step, plan.batch
    console.rule(f"{plan.name} on {plan.topology}")
    console.print(
        f"{plan.devices} devices, {mesh_label(plan.mesh)}; {plan.precision}, remat {plan.remat}; {batch['sequences']:,} "
        f"sequences of {batch['length']:,} in {batch['microbatches']} microbatches", soft_wrap=True,
    )  # fmt: skip
    console.print(verdict(plan), style="bold green" if plan.fits else "bold red")
    table = _table("memory of a device", plan.sources["memory"], "class", "GiB", "share")
    for name, size in plan.memory.items():
        if name not in ("total", "room") and size:
            table.add_row(CLASSES.get(name, name), f"{size / GIB:.2f}", _share(size, plan.memory["total"]))
    console.print(table)

    executed = sum(plan.flops.values())
    table = _table("FLOPs of a device and step", plan.sources["flops"], "what", "FLOPs", "of executed")
    for format, flops in sorted(plan.flops.items(), key=lambda item: -item[1]):
        table.add_row(f"executed, {format}", human(flops), _share(flops, executed))
    table.add_row("useful", human(plan.useful_flops), _share(plan.useful_flops, executed))
    table.add_row("recomputed", human(plan.recomputed), _share(plan.recomputed, executed))
    console.print(table)

    table = _table(
        "communication of a device and step", plan.sources["communication"], "kind", "axes", "link", "count", "GB sent",
        "s", "exposed s",
    )  # fmt: skip
    for row in plan.communication:
        if row["bytes"] >= 1e5:
            table.add_row(
                row["kind"], " x ".join(row["axes"]), row["link"], f"{row['count']:,.0f}", f"{row['bytes'] / 1e9:.3g}",
                f"{row['seconds']:.3f}", f"{row['exposed']:.3f}",
            )  # fmt: skip
    console.print(table)

    if plan.across_data:
        title = "gradients across data, once summed inside replicas"
        table = _table(title, plan.sources["across_data"], "algorithm", "s", "taken")
        for row in plan.across_data:
            table.add_row(row["algorithm"], f"{row['seconds']:.3g}", "yes" if row["taken"] else "")
        console.print(table)

    table = _table("a step", plan.sources["step"], "what", "s", "of the step")
    for name in ("seconds", "work", "products", "memory", "communication", "exposed"):
        table.add_row("step" if name == "seconds" else name, f"{step[name]:.3f}", _share(step[name], step["seconds"]))
    for part, seconds in plan.parts.items():
        table.add_row(f"  work in {part}", f"{seconds:.3f}", _share(seconds, step["seconds"]))
    console.print(table)
    if plan.hidden is not None:
        console.print(f"communication hidden behind work: {plan.hidden:.1%} of its time")
    if plan.pipeline_occupancy is not None:
        console.print(f"pipeline occupancy: {plan.pipeline_occupancy:.1%} of the stages' time is work (count: the schedule)")
    run = plan.run
    cost = f", {run['cost']:,.0f} in the price's currency" if "cost" in run else ""
    console.print(
        f"{step['tokens_per_s_device']:,.0f} tokens/s per device, {human(step['tokens_per_s'])} in all; MFU "
        f"{step['mfu_bf16']:.1%} (useful FLOPs over bf16's dense peak); {human(run['tokens'])} tokens in {run['days']:,.1f} "
        f"days, {human(run['device_hours'])} device-hours{cost}", soft_wrap=True,
    )  # fmt: skip
    for loop, rounds in plan.assumed["loops"].items():
        console.print(f"assumed (imbalance {plan.assumed['imbalance']:g}): {loop} runs {rounds:g} times", soft_wrap=True)
    kinds: dict[str, list[str]] = {}
    for note in plan.notes:
        kinds.setdefault(note.partition(": ")[0], []).append(note)
    for notes in kinds.values():
        more = f" (and {len(notes) - 1} more: see plan.json)" if len(notes) > 1 else ""
        console.print(f"note: {notes[0]}{more}", soft_wrap=True)


def compare(plans: list[Plan], console: Console) -> None:
    """Print a table with a row for each topology; tokens/s are per device."""
    table = _table(
        "plans", "seconds and what follows from them: model", "topology", "mesh", "GiB", "of", "fits", "step s", "tokens/s",
        "MFU", "hidden", "days",
    )  # fmt: skip
    for p in plans:
        table.add_row(
            p.topology, mesh_label(p.mesh), f"{p.memory['total'] / GIB:.1f}", f"{p.memory['room'] / GIB:.1f}",
            "yes" if p.fits else "NO", f"{p.step['seconds']:.2f}", f"{p.step['tokens_per_s_device']:,.0f}",
            f"{p.step['mfu_bf16']:.1%}",
            "-" if p.hidden is None else f"{p.hidden:.0%}", f"{p.run['days']:,.1f}",
        )  # fmt: skip
    console.print(table)
