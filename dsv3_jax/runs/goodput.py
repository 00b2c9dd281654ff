"""Where a run's time went: steps that count, and what checkpoints and failures cost, from events.jsonl and metrics.jsonl."""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from dsv3_jax.errors import UserError
from dsv3_jax.runs.directory import RunDirectory, read_rows

# What an interval between two events is, by the event that ends it; training ends with a failure or well.
_PHASES = {"launch": "restart", "started": "restart", "restored": "restore", "compiled": "compile"}
_UNFINISHED = ("started", "restored", "compiled")
CLASSES = ("steps", "saving", "detection", "restart", "restore", "compile", "recompute", "rest")


@dataclass
class Failure:
    """One, and the seconds until the run computed again. `again`: steps that were lost, whose time is `recompute`."""

    time: float
    cause: str
    again: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # detection, restart, restore, compile, recompute

    @property
    def gap(self) -> float:
        """From the end of the last step before it to the begin of the first one after it."""
        return sum(s for phase, s in self.seconds.items() if phase != "recompute")


@dataclass(frozen=True)
class Account:
    wall: float  # seconds, without those between a stop and the next start
    seconds: dict[str, float]  # by CLASSES; they add up to `wall`
    failures: list[Failure]
    began: float
    ended: float  # when it last came to a good end; 0 if it never did

    @property
    def goodput(self) -> float:
        return self.seconds["steps"] / self.wall if self.wall else 0.0


class RunningAccount:
    """That of a run that goes on, for its metrics: what came before is read once, when its first step is about to begin."""

    def __init__(self, run: RunDirectory):
        past = account(run)
        self._wall, self._steps, self._since = past.wall, past.seconds["steps"], time.time()
        self.costs: dict[str, float] = {}  # seconds lost since the last row, by class
        if past.failures and past.failures[-1].time > past.ended:
            self.costs = past.failures[-1].seconds

    def row(self, step_s: float) -> dict[str, float]:
        """What the row of a step that has just ended says of it."""
        self._steps += step_s
        lost = {f"lost_{phase}_s": round(seconds, 4) for phase, seconds in self.costs.items()}
        self.costs = {}
        return {"goodput": self._steps / (self._wall + time.time() - self._since)} | lost


def read_events(run: RunDirectory) -> list[dict[str, Any]]:
    """All whole lines, by time. Raises `UserError` if there are none."""
    events = read_rows(run.events_file)
    if not events:
        raise UserError(f"{run.path} has no events.jsonl: it is no run, or one of an earlier version")
    return sorted(events, key=lambda e: e["time"])


def account(run: RunDirectory) -> Account:
    """Raises `UserError` for a directory without events."""
    events, rows = read_events(run), read_rows(run.metrics_file)
    ended = sorted([r["time"] for r in rows if "time" in r] + [e["dropped"]["last"] for e in events if e.get("dropped")])
    seconds: dict[str, float] = dict.fromkeys(CLASSES, 0.0)
    failures: list[Failure] = []
    wall = 0.0
    for begin, event in _marks(events, ended):
        spent = event["time"] - begin["time"]
        if begin["event"] == "done" or (begin["event"], event["event"]) == ("ended", "started"):  # nobody wanted it to run
            continue
        wall += spent
        phase = _PHASES.get(event["event"])
        if event["event"] == "failure":
            stepped = max((t for t in ended if begin["time"] <= t <= event["time"]), default=begin["time"])
            phase, spent = "detection", event["time"] - stepped
            failures.append(Failure(event["time"], event["cause"]))
        if phase is None:
            continue
        seconds[phase] += spent
        if failures and phase != "detection" and "compile" in failures[-1].seconds:
            continue  # this failure's gap has ended
        if failures:
            failures[-1].seconds[phase] = failures[-1].seconds.get(phase, 0.0) + spent
        if failures and (dropped := event.get("dropped")):
            failures[-1].again, failures[-1].seconds["recompute"] = dropped["steps"], dropped["seconds"]
    seconds["steps"] = sum(row["step_time_s"] for row in rows)
    seconds["saving"] = sum(e["stall_s"] for e in events if e["event"] == "saved")
    seconds["recompute"] = sum(e["dropped"]["seconds"] for e in events if e.get("dropped"))
    seconds["rest"] = max(0.0, wall - sum(seconds.values()))
    good_ends = [e["time"] for e in events if e["event"] in ("ended", "done")]
    return Account(wall, seconds, failures, events[0]["time"], max(good_ends, default=0.0))


def _marks(events: list[dict[str, Any]], ended: list[float]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Neighbours among events that end a phase. Where a run went on with no word of its failure, that is put in."""
    last = None
    for event in events:
        if event["event"] not in (*_PHASES, "failure", "ended", "done"):
            continue
        if last is not None and event["event"] in ("launch", "started") and last["event"] in _UNFINISHED:
            stepped = max((t for t in ended if last["time"] <= t <= event["time"]), default=last["time"])
            failure = {"time": stepped, "event": "failure", "cause": "ended without a word"}
            yield last, failure
            last = failure
        if last is not None:
            yield last, event
        last = event
    if last is not None and ended and ended[-1] > last["time"]:  # still running, or ended without a word
        yield last, {"time": ended[-1], "event": "ended"}


def show(run: RunDirectory, console: Console) -> None:
    """Print a table of where the time went, and one of failures."""
    total = account(run)
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
