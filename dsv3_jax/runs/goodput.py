"""Goodput: the time a run spent on steps that count, and what checkpoints and failures cost.

All of it is computed from events.jsonl and metrics.jsonl.
"""

import bisect
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dsv3_jax.errors import UserError
from dsv3_jax.records import Record, Records, last_records, number
from dsv3_jax.runs.directory import RunDirectory
from dsv3_jax.runs.events import LATEST, is_event
from dsv3_jax.runs.metrics import is_row

# The class of an interval between two events, by the event that ends it. Training ends by "failure", "ended" or "done".
_PHASES = {"launch": "restart", "started": "restart", "restored": "restore", "compiled": "compile"}
_UNFINISHED = ("started", "restored", "compiled")
CLASSES = ("steps", "saving", "start", "detection", "restart", "restore", "compile", "recompute", "rest")


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
    skipped: dict[str, int] = field(default_factory=dict)  # damaged lines by the file's name

    @property
    def goodput(self) -> float:
        """The share of `wall` that was spent on steps that count."""
        return self.seconds["steps"] / self.wall if self.wall else 0.0


class RunningAccount:
    """Goodput of a run that is training, for its metrics. Reads the past once: create it just before the first step.

    `done` is the step that the run goes on from, after which metrics.jsonl has no rows. The `saved` event of that step says how
    long the steps until then took, so that of a long run's rows only the last are read.
    """

    def __init__(self, run: RunDirectory, done: int):
        events = read_events(run)
        steps_s = 0.0 if done == 0 else _steps_until(events, done)
        if steps_s is None:  # an earlier version's events, or damaged ones
            past = account(run)
        else:
            past = _account(events, [_seconds(row, "time") for row in last_records(run.metrics_file, is_row)], steps_s)
        self._wall, self.steps_s, self._since = past.wall, past.seconds["steps"], time.time()
        self.costs: dict[str, float] = {}  # seconds lost since the last row, by class
        if past.failures and past.failures[-1].time > past.ended:
            self.costs = past.failures[-1].seconds

    def row(self, step_s: float) -> dict[str, float]:
        """The columns `goodput` and `lost_*_s` for the step that has just ended and took `step_s` seconds."""
        self.steps_s += step_s
        lost = {f"lost_{phase}_s": round(seconds, 4) for phase, seconds in self.costs.items()}
        self.costs = {}
        return {"goodput": self.steps_s / (self._wall + time.time() - self._since)} | lost


def _steps_until(events: list[Record], step: int) -> float | None:
    """Seconds of the steps until a checkpoint of `step`, by its event; None if none says so."""
    for event in reversed(events):
        if event["event"] == "saved" and event.get("step") == step:
            seconds = number(event, "steps_s", -1.0)
            return seconds if 0 <= seconds <= LATEST else None
    return None


class _Dropped(NamedTuple):
    """Steps that a restored run does again: how many, the seconds they took, and when the last one ended."""

    steps: int
    seconds: float
    last: float  # 0 if unknown


def _dropped(event: Record) -> _Dropped | None:
    found = event.get("dropped")
    return (
        _Dropped(int(number(found, "steps")), _seconds(found, "seconds"), _seconds(found, "last"))
        if isinstance(found, dict) and found
        else None
    )


def _seconds(record: Mapping[str, Any], key: str) -> float:
    """A record's number of seconds; 0 for what no run can have taken."""
    found = number(record, key)
    return found if 0 <= found <= LATEST else 0.0


def _is_possible_row(record: Record) -> bool:
    return is_row(record) and max(number(record, "time"), number(record, "step_time_s")) <= LATEST


def _sound_events(run: RunDirectory) -> tuple[list[Record], int]:
    """A run's events by time, and how many lines are damaged. Raises `UserError` if it has no sound one."""
    found = Records(run.events_file, is_event)
    events = sorted(found, key=lambda e: e["time"])
    if not events and found.skipped:
        raise UserError(f"{run.events_file}: each of its {found.skipped} lines is damaged")
    if not events:
        raise UserError(f"{run.path} has no events.jsonl: it is no run, or one of an earlier version")
    return events, found.skipped


def read_events(run: RunDirectory) -> list[Record]:
    """A run's sound events, by time. Raises `UserError` if it has none."""
    return _sound_events(run)[0]


def account(run: RunDirectory) -> Account:
    """Where the time of a run went. Raises `UserError` for a directory without events."""
    events, damaged = _sound_events(run)
    rows, ended, steps_s = Records(run.metrics_file, _is_possible_row), [], 0.0
    for row in rows:
        ended.append(_seconds(row, "time"))
        steps_s += _seconds(row, "step_time_s")
    skipped = {run.metrics_file.name: rows.skipped, run.events_file.name: damaged}
    return _account(events, ended, steps_s, {name: count for name, count in skipped.items() if count})


def _account(events: list[Record], rows: list[float], steps_s: float, skipped: dict[str, int] | None = None) -> Account:
    """The account of these events, with the times at which steps ended and the seconds that they took."""
    dropped = [d for e in events if (d := _dropped(e))]
    ended = sorted(t for t in (*rows, *(d.last for d in dropped)) if t)
    seconds: dict[str, float] = dict.fromkeys(CLASSES, 0.0)
    failures: list[Failure] = []
    wall = 0.0
    for begin, event in _marks(events, ended):
        spent = event["time"] - begin["time"]
        if begin["event"] == "done" or (begin["event"], event["event"]) == ("ended", "started"):  # a pause: stopped on purpose
            continue
        wall += spent
        phase = _PHASES.get(event["event"])
        if phase == "restore" and event.get("step") == 0 and not failures:  # a state was made, and none read
            phase = "start"
        if event["event"] == "failure":
            phase, spent = "detection", event["time"] - _last_step(ended, begin["time"], event["time"])
            failures.append(Failure(event["time"], str(event.get("cause", "unknown"))))
        if phase is None:
            continue
        seconds[phase] += spent
        if failures and phase != "detection" and "compile" in failures[-1].seconds:
            continue  # this failure's gap has ended
        if failures:
            failures[-1].seconds[phase] = failures[-1].seconds.get(phase, 0.0) + spent
        if failures and (again := _dropped(event)):
            failures[-1].again, failures[-1].seconds["recompute"] = again.steps, again.seconds
    seconds["steps"] = steps_s
    seconds["saving"] = sum(_seconds(e, "stall_s") for e in events if e["event"] == "saved")
    seconds["recompute"] = sum(d.seconds for d in dropped)
    seconds["rest"] = max(0.0, wall - sum(seconds.values()))
    good_ends = [e["time"] for e in events if e["event"] in ("ended", "done")]
    return Account(wall, seconds, failures, events[0]["time"], max(good_ends, default=0.0), skipped or {})


def _last_step(ended: list[float], begin: float, end: float) -> float:
    """When the last step between two times ended, of the ascending times `ended`; `begin` if there was none."""
    before = bisect.bisect_right(ended, end)
    return ended[before - 1] if before and ended[before - 1] >= begin else begin


def _marks(events: list[Record], ended: list[float]) -> Iterator[tuple[Record, Record]]:
    """Pairs of consecutive events that bound an interval. A failure that nobody recorded is inserted before the next start."""
    last = None
    for event in events:
        if event["event"] not in (*_PHASES, "failure", "ended", "done"):
            continue
        if last is not None and event["event"] in ("launch", "started") and last["event"] in _UNFINISHED:
            failure = {
                "time": _last_step(ended, last["time"], event["time"]),
                "event": "failure",
                "cause": "ended without a word",
            }
            yield last, failure
            last = failure
        if last is not None:
            yield last, event
        last = event
    if last is not None and ended and ended[-1] > last["time"]:  # still running, or ended without a word
        yield last, {"time": ended[-1], "event": "ended"}
