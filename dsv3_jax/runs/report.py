"""`dsv3 report`: where a run's time went, as tables."""

import statistics

from rich.console import Console
from rich.table import Table

from dsv3_jax.runs.directory import RunDirectory
from dsv3_jax.runs.goodput import CLASSES, account


def show(run: RunDirectory, console: Console) -> None:
    """Print a table of where the time went, and one of failures. Raises `UserError` for a directory without events."""
    total = account(run)
    for name, count in total.skipped.items():
        console.print(f"{run.path / name}: {count} damaged lines are left out")
    table = Table("", "s", "of all", title=f"{run.path}: {total.wall:.0f} s, goodput {total.goodput:.1%}")
    for name in CLASSES:
        table.add_row(name, f"{total.seconds[name]:.1f}", f"{total.seconds[name] / max(total.wall, 1e-9):.1%}")
    console.print(table)
    phases = ("detection", "restart", "restore", "compile", "recompute")
    if not total.failures:
        console.print("no failures")
        return
    table = Table("after, s", "failure", *(f"{p} s" for p in phases), "steps again", "gap s", title="failures")
    for f in total.failures:
        split = (f"{f.seconds.get(p, 0.0):.1f}" for p in phases)
        table.add_row(f"{f.time - total.began:.0f}", f.cause, *split, str(f.again), f"{f.gap:.1f}")
    console.print(table)
    console.print(
        f"{len(total.failures)} failures; median gap {statistics.median(f.gap for f in total.failures):.1f} s "
        f"(from the last step before to the first one after)"
    )
