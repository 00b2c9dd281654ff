"""Plans as one self-contained HTML page with tables and plots (SVG)."""

import html
import io
from typing import Any

from matplotlib.figure import Figure

from dsv3_jax.cost.topologies import GIB
from dsv3_jax.pages import svg
from dsv3_jax.plan.figures import CLASSES, Plan
from dsv3_jax.plan.report import compare, show, verdict
from dsv3_jax.progress import make_console

_STYLE = "body{font:15px/1.5 sans-serif;max-width:75em;margin:2em auto;padding:0 1em}pre{font-size:12px;overflow-x:auto}"


def _bars(axes: Any, labels: list[str], stacks: dict[str, list[float]], unit: str, title: str) -> None:
    """Stacked horizontal bars, a row for each label."""
    left = [0.0] * len(labels)
    for name, sizes in stacks.items():
        axes.barh(labels, sizes, left=left, label=name)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel=unit, title=title)
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.3), ncol=4)  # below, where no bar is
    axes.grid(alpha=0.3, axis="x")


def _plots(plans: list[Plan]) -> str:
    names = [p.topology for p in plans]
    figure = Figure(figsize=(11, 2.8 + 0.5 * len(plans)), layout="constrained")
    memory, time = figure.subplots(1, 2)
    classes = dict.fromkeys(c for p in plans for c in p.memory if c not in ("total", "room"))
    _bars(
        memory,
        names,
        {CLASSES.get(c, c): [p.memory.get(c, 0) / GIB for p in plans] for c in classes},
        "GiB per device",
        "memory",
    )
    for row, p in enumerate(plans):
        memory.plot([p.memory["room"] / GIB] * 2, [row - 0.4, row + 0.4], color="black")
    stacks = {
        "work": [p.step["work"] for p in plans], "exposed communication": [p.step["exposed"] for p in plans],
        "other waiting": [max(0.0, p.step["seconds"] - p.step["work"] - p.step["exposed"]) for p in plans],
    }  # fmt: skip
    _bars(time, names, stacks, "seconds", "one step (model)")
    return svg(figure)


def _links(plan: Plan) -> str:
    rows = [r for r in plan.communication if r["seconds"] > 0.01 * max(1e-9, plan.step["communication"])]
    if not rows:
        return ""
    figure = Figure(figsize=(11, 2.0 + 0.35 * len(rows)), layout="constrained")
    labels = [f"{r['kind']}, {' x '.join(r['axes'])}, {r['link']}" for r in rows]
    stacks = {"hidden": [r["seconds"] - r["exposed"] for r in rows], "exposed": [r["exposed"] for r in rows]}
    _bars(figure.subplots(), labels, stacks, "seconds per step (model)", f"{plan.topology}: communication")
    return svg(figure)


def page(plans: list[Plan]) -> str:
    """The page's HTML."""
    console = make_console(io.StringIO(), width=150, record=True, force_terminal=False)
    if len(plans) > 1:
        compare(plans, console)
    for plan in plans:
        show(plan, console)
    title = html.escape(f"{plans[0].name}: {', '.join(p.topology for p in plans)}")
    summary = "".join(f"<p><b>{html.escape(p.topology)}</b> {html.escape(verdict(p))}</p>" for p in plans)
    text = html.escape(console.export_text())
    return (
        f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>{summary}"
        f"{_plots(plans)}{''.join(_links(p) for p in plans)}<pre>{text}</pre>\n"
    )
