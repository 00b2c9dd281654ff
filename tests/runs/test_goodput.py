"""Accounts of runs whose seconds are known by hand."""

import json

import pytest
from rich.console import Console

from dsv3_jax.errors import UserError
from dsv3_jax.runs.directory import RunDirectory
from dsv3_jax.runs.goodput import RunningAccount, account
from dsv3_jax.runs.report import show


def run_of(path, events, rows) -> RunDirectory:
    path.mkdir()
    (path / "events.jsonl").write_text("".join(json.dumps({"time": t, "event": e} | more) + "\n" for t, e, more in events))
    (path / "metrics.jsonl").write_text(
        "".join(json.dumps(dict(zip(("step", "time", "step_time_s"), r, strict=True))) + "\n" for r in rows)
    )
    return RunDirectory(path)


# An attempt that compiles for 9 s and is killed in its fourth step; the next goes on from step 2.
EVENTS = [
    (100.0, "launch", {"attempt": 1}),
    (102.0, "started", {}),
    (105.0, "restored", {"step": 0, "dropped": None}),
    (114.0, "compiled", {"step": 1}),
    (116.0, "saved", {"step": 2, "stall_s": 0.25}),
    (117.5, "failure", {"cause": "process 1 was ended by SIGKILL", "host": "b"}),
    (118.0, "launch", {"attempt": 2}),
    (119.0, "started", {}),
    (119.5, "restored", {"step": 2, "dropped": {"steps": 1, "seconds": 1.0, "last": 117.0}}),
    (119.8, "compiled", {"step": 3}),
    (124.0, "ended", {"step": 6}),
    (126.0, "done", {"code": 0}),
]
ROWS = [(1, 115.0, 1.0), (2, 116.0, 1.0), (3, 121.0, 1.2), (4, 122.0, 1.0), (5, 123.0, 1.0), (6, 124.0, 1.0)]


def test_every_second_has_its_place(tmp_path):
    total = account(run_of(tmp_path / "r", EVENTS, ROWS))
    assert total.wall == pytest.approx(26)
    expected = {
        "steps": 1.0 + 1.0 + 1.2 + 3.0,
        "saving": 0.25,
        "detection": 0.5,
        "restart": 2.0 + 0.5 + 1.0,
        "restore": 3.0 + 0.5,
        "compile": 9.0 + 0.3,
        "recompute": 1.0,
    }
    assert {k: total.seconds[k] for k in expected} == pytest.approx(expected)
    assert sum(total.seconds.values()) == pytest.approx(total.wall)
    assert total.goodput == pytest.approx(6.2 / 26)
    (failure,) = total.failures
    assert failure.seconds == pytest.approx(
        {"detection": 0.5, "restart": 1.5, "restore": 0.5, "compile": 0.3, "recompute": 1.0}
    )
    assert failure.gap == pytest.approx(2.8)
    assert failure.again == 1


def test_a_failure_in_a_start_is_one_of_its_own(tmp_path):
    events = [
        *EVENTS[:8],
        (119.2, "failure", {"cause": "again", "host": "a"}),
        (120.0, "launch", {}),
        (121.0, "started", {}),
        *((t + 3, e, m) for t, e, m in EVENTS[8:]),
    ]
    total = account(run_of(tmp_path / "r", events, [(s, t + (3 if s > 2 else 0), d) for s, t, d in ROWS]))
    first, second = total.failures
    assert first.seconds == pytest.approx({"detection": 0.5, "restart": 1.5})
    assert second.seconds["detection"] == pytest.approx(0.2)
    assert second.gap == pytest.approx(0.2 + 0.8 + 1.0 + 1.5 + 0.3)
    assert sum(total.seconds.values()) == pytest.approx(total.wall)


def test_without_a_supervisor_a_silent_end_is_found(tmp_path):
    """As under SLURM: nothing says that the first attempt failed."""
    events = [(t, e, m) for t, e, m in EVENTS if e not in ("launch", "failure", "done")]
    total = account(run_of(tmp_path / "r", events, ROWS))
    (failure,) = total.failures
    assert failure.cause == "ended without a word"
    assert failure.seconds["restart"] == pytest.approx(2.0)  # from its last step to the next start
    assert failure.gap == pytest.approx(2.8)


def test_pauses_do_not_count_and_cut_lines_do_no_harm(tmp_path):
    later = [(1000.0, "launch", {}), (1001.0, "started", {}), (1002.0, "restored", {"step": 6}), (1003.0, "compiled", {})]
    run = run_of(tmp_path / "r", [*EVENTS, *later], [*ROWS, (7, 1003.0, 1.0)])
    with open(run.events_file, "a") as file:
        file.write('{"time": 1003.5, "event": "sav')
    total = account(run)
    assert total.wall == pytest.approx(26 + 3)
    with Console(width=150, record=True) as console:
        show(run, console)
    assert "1 failures; median gap 2.8 s" in console.export_text()


def test_pauses_without_a_supervisor_do_not_count_either(tmp_path):
    events = [(t, e, m) for t, e, m in EVENTS if e not in ("launch", "failure", "done")]
    later = [(1001.0, "started", {}), (1002.0, "restored", {"step": 6}), (1003.0, "compiled", {})]
    rows = [*ROWS, (7, 1004.0, 1.0)]
    assert account(run_of(tmp_path / "r", [*events, *later], rows)).wall == pytest.approx(22 + 3)


def test_metrics_say_what_a_failure_cost(tmp_path, monkeypatch):
    """The first row after it; later ones what a save cost; and all the goodput so far."""
    run = run_of(tmp_path / "r", EVENTS[:10], ROWS[:2])
    clock = iter([119.8, 121.0, 122.5, 123.5])  # the first step is about to begin; three end
    monkeypatch.setattr("dsv3_jax.runs.goodput.time.time", lambda: next(clock))
    running = RunningAccount(run)
    assert running.row(1.2) == pytest.approx({
        "goodput": 3.2 / 21.0, "lost_detection_s": 0.5, "lost_restart_s": 1.5, "lost_restore_s": 0.5, "lost_compile_s": 0.3,
        "lost_recompute_s": 1.0,
    })  # fmt: skip
    running.costs["saving"] = 0.25
    assert running.row(1.0) == pytest.approx({"goodput": 4.2 / 22.5, "lost_saving_s": 0.25})
    assert running.row(1.0) == pytest.approx({"goodput": 5.2 / 23.5})


def test_a_start_that_follows_no_failure_has_cost_nothing(tmp_path):
    later = [(1000.0, "launch", {}), (1001.0, "started", {}), (1002.0, "restored", {"step": 6}), (1003.0, "compiled", {})]
    assert not RunningAccount(run_of(tmp_path / "r", [*EVENTS, *later], ROWS)).costs


def test_a_directory_without_events_is_named(tmp_path):
    with pytest.raises(UserError, match=r"has no events.jsonl"):
        account(RunDirectory(tmp_path))
