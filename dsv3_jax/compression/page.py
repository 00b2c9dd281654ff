"""compress.json as one self-contained HTML page with tables and plots (SVG), readable on light and dark screens."""

import html
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from dsv3_jax.compression.parts import PARTS
from dsv3_jax.compression.report_tables import Table, headline, layer_errors, short, starved_below, tables
from dsv3_jax.pages import INK, svg

_STYLE = """
:root{color-scheme:light dark}
body{font:15px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em}
body{color:light-dark(#222,#ddd);background:light-dark(#fff,#181a1b)}
table{border-collapse:collapse;margin:.5em 0}th,td{padding:.2em .9em;text-align:right;border-bottom:1px solid #8886}
th:first-child,td:first-child{text-align:left}section{overflow-x:auto}svg{max-width:100%;height:auto}
"""
_COLOURS = {  # of Okabe and Ito, which the colour-blind tell apart, and mid tones that show on white and on black
    "routed experts": "#d55e00", "shared experts": "#e69f00", "dense FFN": "#cc79a7", "q": "#0072b2", "kv": "#56b4e9",
    "o": "#009e73", "routers": "#999999", "MTP modules": "#9467bd", "embedding": "#8c6d31", "head": "#bd9e39",
    "norms": "#777777",
}  # fmt: skip


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    _in_ink(axes)
    return figure, axes


def _in_ink(axes: Any) -> None:
    """Everything that matplotlib would draw in black."""
    axes.tick_params(which="both", colors=INK)
    for spine in axes.spines.values():
        spine.set_edgecolor(INK)
    for text in (axes.xaxis.label, axes.yaxis.label, axes.title):
        text.set_color(INK)


def _legend(axes: Any, **where: Any) -> None:
    axes.legend(fontsize=8, labelcolor=INK, framealpha=0, **where)


def _coverage(report: dict[str, Any]) -> str:
    """Tokens of each expert as colours, a row for each layer, with a cross on starved ones."""
    lines = [line for line in report["layers"] if line.get("tokens_per_expert")]
    if not lines:
        return ""
    widest = max(len(line["tokens_per_expert"]) for line in lines)
    tokens_LE = np.full((len(lines), widest), np.nan)
    for row, line in zip(tokens_LE, lines, strict=True):
        row[: len(line["tokens_per_expert"])] = line["tokens_per_expert"]
    most = max(2.0, float(np.nanmax(tokens_LE)))
    least = min(max(1.0, float(np.nanmin(tokens_LE))), most / 2)
    figure, axes = _figure(10, min(14.0, 1.2 + 0.32 * len(lines)))
    shown = axes.pcolormesh(
        np.maximum(tokens_LE, 1), cmap="viridis", norm=LogNorm(least, most), edgecolor="face", rasterized=True
    )
    layers, experts = np.nonzero(tokens_LE < starved_below(report))
    axes.scatter(experts + 0.5, layers + 0.5, marker="x", color="#ff5555", s=min(40, 4000 / widest), linewidths=1.2)
    axes.set(xlabel="expert", ylim=(len(lines), 0))
    every = max(1, len(lines) // 30)
    axes.set_yticks(np.arange(0, len(lines), every) + 0.5, [short(line["layer"]) for line in lines[::every]])
    bar = figure.colorbar(shown, ax=axes, label="tokens", pad=0.01)
    _in_ink(bar.ax)
    bar.outline.set_edgecolor(INK)
    return svg(figure)


def _errors(report: dict[str, Any]) -> str:
    """Each part's output error over the layers: GPTQ's as full dots on a line, that of rounding as rings."""
    lines = [(short(line["layer"]), layer_errors(line)) for line in report["layers"]]
    if not any(errors for _, errors in lines):
        return ""
    figure, axes = _figure(10, 4.2)
    for part in PARTS:
        at = [i for i, (_, errors) in enumerate(lines) if part in errors]
        if not at:
            continue
        gptq, rounding = ([max(lines[i][1][part][by], 1e-12) for i in at] for by in ("gptq", "rounding"))
        axes.plot(at, gptq, "o-", color=_COLOURS[part], label=part, markersize=5, linewidth=1.2)
        axes.plot(at, rounding, "o", color=_COLOURS[part], markersize=6, markerfacecolor="none")
    axes.plot([], [], "o", color=INK, markerfacecolor="none", label="rounding to nearest")
    every = max(1, len(lines) // 16)
    axes.set_xticks(range(0, len(lines), every), [name for name, _ in lines[::every]])
    axes.set(yscale="log", ylabel="output error, relative and squared")
    axes.grid(alpha=0.25, which="both")
    _legend(axes, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return svg(figure)


def _sizes(report: dict[str, Any]) -> str:
    """Two bars, before and after, by part."""
    sizes = report.get("sizes")
    if not sizes:
        return ""
    total = sum(size["original"] for size in sizes.values())
    unit, scale = next((unit, scale) for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1)) if total >= scale)
    figure, axes = _figure(10, 2.6)
    left = np.zeros(2)
    for part in (p for p in PARTS if p in sizes):
        widths = np.array([sizes[part]["original"], sizes[part]["compressed"]]) / scale
        axes.barh(["bfloat16", "compressed"], widths, left=left, color=_COLOURS[part], label=part)
        left += widths
    for row, width in enumerate(left):
        axes.text(width, row, f" {width:.3g} {unit}", va="center", color=INK, fontsize=9)
    axes.invert_yaxis()
    axes.set(xlabel=unit, xlim=(0, 1.12 * left.max()))
    axes.grid(alpha=0.25, axis="x")
    _legend(axes, loc="upper center", bbox_to_anchor=(0.5, -0.3), ncol=6)
    return svg(figure)


def _html(table: Table) -> str:
    heads = "".join(f"<th>{html.escape(head)}</th>" for head in table.heads)
    rows = ("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return f"<h2>{html.escape(table.title)}</h2><table><tr>{heads}</tr>{''.join(rows)}</table>"


def page(report: dict[str, Any], name: str) -> str:
    """The page's HTML; `name` is the checkpoint's."""
    title = html.escape(f"{name}: compressed as {report['profile']['name']}")
    about = "".join(f"<li>{html.escape(line)}</li>" for line in headline(report))
    found = tables(report)
    plots = (
        ("Where the bytes are", _sizes(report)),
        (
            "Where the error is",
            _errors(report),
        ),
        (
            f"What each expert saw of the calibration text (crosses: fewer than {starved_below(report)} tokens)",
            _coverage(report),
        ),
    )
    drawn = "".join(f"<h2>{html.escape(text)}</h2><section>{plot}</section>" for text, plot in plots if plot)
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>"
        f"<ul>{about}</ul>{''.join(_html(table) for table in found[:-1])}{drawn}{''.join(_html(table) for table in found[-1:])}"
        "<p>Output error: the squared error of a layer's output over its square, on what calibration saw; a part's is the mean "
        "over its weights. Intervals are 95%, windows taken as independent.</p></html>\n"
    )
