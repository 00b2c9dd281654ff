"""Goodput: the time a run spent on steps that count, and what checkpoints and failures cost.

All of it is computed from events.jsonl and metrics.jsonl.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from dsv3_jax.errors import UserError
from dsv3_jax.runs.directory import RunDirectory
from dsv3_jax.runs.metrics import read_rows

# The class of an interval between two events, by the event that ends it. Training ends by "failure", "ended" or "done".
_PHASES = {"launch": "restart", "started": "restart", "restored": "restore", "compiled": "compile"}
_UNFINISHED = ("started", "restored", "compiled")
CLASSES = ("steps", "saving", "detection", "restart", "restore", "compile", "recompute", "rest")


@dataclass
class Failure:
    """A failure, and what the time until the run computed again was spent on."""

    time: float  # seconds since 1970
    cause: str
    again: int = 0  # steps that were lost and done again; they took seconds["recompute"]
    seconds: dict[str, float] = field(default_factory=dict)  # by detection, restart, restore, compile, recompute

    @property
    def gap(self) -> float:
        """Seconds from the end of the last step before the failure to the beginning of the first step after it."""
        return sum(s for phase, s in self.seconds.items() if phase != "recompute")


@dataclass(frozen=True)
class Account:
    """A run's time, by what it was spent on."""

    wall: float  # seconds, without those between a stop and the next start
    seconds: dict[str, float]  # by CLASSES; they add up to `wall`
    failures: list[Failure]
    began: float  # seconds since 1970
    ended: float  # when it last ended without a failure; 0 if it never did

    @property
    def goodput(self) -> float:
        """The share of `wall` that was spent on steps that count."""
        return self.seconds["steps"] / self.wall if self.wall else 0.0


class RunningAccount:
    """Goodput of a run that is training, for its metrics. Reads the past once: create it just before the first step."""

    def __init__(self, run: RunDirectory):
        past = account(run)
        self._wall, self._steps, self._since = past.wall, past.seconds["steps"], time.time()
        self.costs: dict[str, float] = {}  # seconds lost since the last row, by class
        if past.failures and past.failures[-1].time > past.ended:
            self.costs = past.failures[-1].seconds

    def row(self, step_s: float) -> dict[str, float]:
        """The columns `goodput` and `lost_*_s` for the step that has just ended and took `step_s` seconds."""
        self._steps += step_s
        lost = {f"lost_{phase}_s": round(seconds, 4) for phase, seconds in self.costs.items()}
        self.costs = {}
        return {"goodput": self._steps / (self._wall + time.time() - self._since)} | lost


def read_events(run: RunDirectory) -> list[dict[str, Any]]:
    """A run's events, by time. Raises `UserError` if it has none."""
    events = read_rows(run.events_file)
    if not events:
        raise UserError(f"{run.path} has no events.jsonl: it is no run, or one of an earlier version")
    return sorted(events, key=lambda e: e["time"])


def account(run: RunDirectory) -> Account:
    """Where the time of a run went. Raises `UserError` for a directory without events."""
    events, rows = read_events(run), read_rows(run.metrics_file)
    ended = sorted([r["time"] for r in rows if "time" in r] + [e["dropped"]["last"] for e in events if e.get("dropped")])
    seconds: dict[str, float] = dict.fromkeys(CLASSES, 0.0)
    failures: list[Failure] = []
    wall = 0.0
    for begin, event in _marks(events, ended):
        spent = event["time"] - begin["time"]
        if begin["event"] == "done" or (begin["event"], event["event"]) == ("ended", "started"):  # a pause: stopped on purpose
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
    """Pairs of consecutive events that bound an interval. A failure that nobody recorded is inserted before the next start."""
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
