"""What compress.json says, as tables for a terminal and a page."""

from dataclasses import dataclass
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from dsv3_jax.compression.parts import MTP, PARTS, part_of_weight
from dsv3_jax.compression.report import STARVED, errors_by_part, mean_error
from dsv3_jax.progress import human


@dataclass(frozen=True)
class Table:
    """A title, column heads, and rows of text; all columns but the first hold figures."""

    title: str
    heads: tuple[str, ...]
    rows: list[tuple[str, ...]]


def starved_below(report: dict[str, Any]) -> int:
    """The number of tokens under which an expert counts as starved."""
    return report["calibration"].get("starved_below", STARVED)


def short(layer: str) -> str:
    """A layer's name in few letters."""
    return layer.replace(" layer", "").replace(" module", "")


def headline(report: dict[str, Any]) -> list[str]:
    """What was done, in sentences."""
    profile, calibration = report["profile"], report["calibration"]
    lines = [
        f"profile {profile['name']}: linear layers {_format(profile.get('linears'))}, "
        f"routed experts {_format(profile.get('experts'))}, method {profile.get('method')}",
        f"calibrated on {calibration['tokens']:,} tokens in {calibration['windows']:,} windows",
    ]
    sizes = report.get("sizes", {}).values()
    if after := sum(s["compressed"] for s in sizes):
        before = sum(s["original"] for s in sizes)
        lines.append(f"{human(before, 'B')} in bfloat16 became {human(after, 'B')}, {before / after:.2f} times less")
    layers = report["layers"]
    if experts := sum(len(line.get("tokens_per_expert", ())) for line in layers):
        starved = sum(n < starved_below(report) for line in layers for n in line.get("tokens_per_expert", ()))
        lines.append(f"{starved} of {experts} experts saw fewer than {starved_below(report)} tokens")
    measured = report.get("measured", {"skipped": "an earlier version wrote this report"})
    if "skipped" in measured:
        lines.append(f"not measured: {measured['skipped']}")
    retries = [retry for line in layers for retry in line.get("retries", ())]
    return lines + [f"retried: {retry}" for retry in retries]


def _format(format: Any) -> str:
    if not isinstance(format, dict):
        return "in 8-bit floats" if format else "as they were"
    kind = "" if format["symmetric"] else ", with zero points"
    return f"in {format['bits']} bits by groups of {format['group']}{kind}"


def tables(report: dict[str, Any]) -> list[Table]:
    """All tables for which there are figures. Raises what a report of another form makes of it."""
    found = _measured(report.get("measured", {})), _parts(report), _layers(report)
    return [table for table in found if table.rows]


def _measured(measured: dict[str, Any]) -> Table:
    if not measured or "skipped" in measured:
        return Table("", (), [])

    def changed(figure: dict[str, float | None], form: str) -> str:
        value, ci95 = figure["value"], figure["ci95"]
        return "-" if value is None else f"{value:{form}}" + ("" if ci95 is None else f" ± {ci95:{form.lstrip('+')}}")

    rows = [
        (
            "loss, nats a token", f"{measured['original_loss']:.4f}", f"{measured['loss']:.4f}",
            changed(measured["loss_change"], "+.2%"),
        ),
        ("KL(original || compressed), nats", "", "", changed(measured["kl"], ".5f")),
        ("right next tokens kept", "", f"{measured['accuracy']:.2%}", changed(measured["top1_kept"], ".2%")),
        ("same next token as the original", "", "", changed(measured["agreement"], ".2%")),
    ]  # fmt: skip
    drafts = zip(
        measured["original_mtp_acceptance"], measured["mtp_acceptance"], measured["mtp_acceptance_change"], strict=True
    )
    for k, (before, after, change) in enumerate(drafts):
        was, now = ("-" if a["value"] is None else f"{a['value']:.2%}" for a in (before, after))
        rows.append((f"drafts of MTP module {k} accepted", was, now, changed(change, "+.2%")))
    title = f"measured on {measured['targets']:,} held-out tokens, {measured['windows']:,} windows"
    return Table(title, ("", "original", "compressed", "change ± 95%"), rows)


def _parts(report: dict[str, Any]) -> Table:
    sizes, errors = report.get("sizes", {}), report.get("output_error") or errors_by_part(report["layers"])
    rows = []
    for part in (p for p in PARTS if p in sizes or p in errors):
        size = sizes.get(part)
        shown = ("", "", "")
        if size:
            times = f"{size['original'] / size['compressed']:.2f}" if size["compressed"] else "-"
            shown = human(size["original"], "B"), human(size["compressed"], "B"), times
        rows.append((part, *shown, *_errors(errors.get(part))))
    return Table("by part of the model", ("", "bfloat16", "compressed", "x less", "output error", "if rounded"), rows)


def _errors(error: dict[str, float] | None) -> tuple[str, str]:
    return (f"{error['gptq']:.3%}", f"{error['rounding']:.3%}") if error else ("", "")


def layer_errors(line: dict[str, Any]) -> dict[str, dict[str, float]]:
    """{part: mean output error of its weights} in one layer."""
    by_part: dict[str, list[dict[str, float]]] = {}
    for name, error in line.get("output_error", {}).items():
        by_part.setdefault(part_of_weight(name), []).append(error)
    return {part: mean_error(by_part[part]) for part in PARTS if part in by_part and part != MTP}


def _layers(report: dict[str, Any]) -> Table:
    rows = []
    for line in report["layers"]:
        tokens, errors = line.get("tokens_per_expert", []), layer_errors(line)
        seen = (f"{min(tokens):,}", f"{median(tokens):,.0f}", f"{max(tokens):,}") if tokens else ("", "", "")
        starved = str(sum(n < starved_below(report) for n in tokens)) if tokens else ""
        worst = max(errors, key=lambda part: errors[part]["gptq"], default=None)
        most = f"{errors[worst]['gptq']:.2%} {worst}" if worst else ""
        rows.append((short(line["layer"]), *seen, starved, most))
    return Table("by layer: tokens of its experts", ("", "least", "median", "most", "starved", "largest error"), rows)


def show(report: dict[str, Any], found: list[Table], console: Console) -> None:
    """Print a report as text and tables, which fit 80 columns."""
    for line in headline(report):
        console.print(line, soft_wrap=True)
    for table in found:
        shown = RichTable(*table.heads[:1], title=table.title, title_justify="left")
        for head in table.heads[1:]:
            shown.add_column(head, justify="right")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
    if any(line.get("output_error") for line in report["layers"]):
        console.print("output error: squared error of a layer's output over its square, on what calibration saw")
