"""Accounts of runs whose seconds are known by hand."""

import io
import json

import pytest
from rich.console import Console

from dsv3_jax.errors import UserError
from dsv3_jax.progress import make_console
from dsv3_jax.runs.directory import RunDirectory
from dsv3_jax.runs.events import EventLog
from dsv3_jax.runs.goodput import RunningAccount, account, read_events
from dsv3_jax.runs.loss_curve import plot_loss
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
        "start": 3.0,
        "restore": 0.5,
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
    running = RunningAccount(run, 2)
    assert running.row(1.2) == pytest.approx({
        "goodput": 3.2 / 21.0, "lost_detection_s": 0.5, "lost_restart_s": 1.5, "lost_restore_s": 0.5, "lost_compile_s": 0.3,
        "lost_recompute_s": 1.0,
    })  # fmt: skip
    running.costs["saving"] = 0.25
    assert running.row(1.0) == pytest.approx({"goodput": 4.2 / 22.5, "lost_saving_s": 0.25})
    assert running.row(1.0) == pytest.approx({"goodput": 5.2 / 23.5})


def test_a_running_account_reads_the_last_rows_only(tmp_path, monkeypatch):
    """The checkpoint's event says what the steps before it took; without it, all rows are read, to the same end."""
    run = run_of(tmp_path / "r", EVENTS[:10], ROWS[:2])
    monkeypatch.setattr("dsv3_jax.runs.goodput.time.time", lambda: 119.8)
    by_rows = RunningAccount(run, 2)
    saved = (116.0, "saved", {"step": 2, "stall_s": 0.25, "steps_s": 2.0})
    told = run_of(tmp_path / "told", [*EVENTS[:4], saved, *EVENTS[5:10]], ROWS[:2])
    monkeypatch.setattr("dsv3_jax.runs.goodput.account", None)  # which reads all
    by_event = RunningAccount(told, 2)
    assert by_event.costs == by_rows.costs
    assert by_event.steps_s == by_rows.steps_s == 2.0
    assert by_event.row(1.0) == by_rows.row(1.0)


HOSTILE = [
    b"\xff\xfe", b"null", b"[1]", b'{"time": "5", "event": "launch"}', b'{"time": 103, "event": []}',
    b'{"time": ' + b"9" * 400 + b', "event": "done"}', b'{"time": NaN, "event": "done"}', b"[" * 50_000,
]  # fmt: skip


def test_an_event_after_one_that_was_cut_off_is_kept(tmp_path):
    run = run_of(tmp_path / "r", EVENTS[:2], [])
    with open(run.events_file, "a") as file:
        file.write('{"time": 103.0, "eve')
    for step in (0, 1):
        EventLog(run.events_file).write("restored", step=step)
    assert [event["event"] for event in read_events(run)] == ["launch", "started", "restored", "restored"]
    assert account(run).skipped == {"events.jsonl": 1}


def test_damaged_lines_are_left_out_of_a_report_and_counted(tmp_path):
    run = run_of(tmp_path / "r", EVENTS, ROWS)
    sound = account(run)
    for file, damage in ((run.events_file, HOSTILE), (run.metrics_file, HOSTILE[:3])):
        lines = file.read_bytes().splitlines()
        file.write_bytes(b"\n".join([*damage, *lines, *damage, b""]))
    total = account(run)
    assert total.skipped == {"metrics.jsonl": 6, "events.jsonl": 16}
    assert (total.seconds, total.failures) == (sound.seconds, sound.failures)
    out = io.StringIO()
    show(run, make_console(out))
    assert f"{run.events_file}: 16 damaged lines are left out" in out.getvalue()
    run.events_file.write_bytes(b"\xff\n")
    with pytest.raises(UserError, match="each of its 1 lines is damaged"):
        account(run)


def test_times_that_cannot_be_are_left_out_and_counted(tmp_path):
    """1e308 is a finite number, and was printed with all its digits, beside shares of inf%."""
    far = [(1e308, "failure", {}), (1e300, "done", {})]
    run = run_of(
        tmp_path / "r", [*EVENTS, (125.0, "saved", {"stall_s": 1e308}), *far], [*ROWS, (7, 1e308, 1.0), (8, 125.0, 1e308)]
    )
    out = io.StringIO()
    show(run, make_console(out))
    assert f"{run.events_file}: 2 damaged lines are left out" in out.getvalue()
    assert f"{run.metrics_file}: 2 damaged lines are left out" in out.getvalue()
    assert account(run).seconds == account(run_of(tmp_path / "sound", EVENTS, ROWS)).seconds


def test_a_start_after_a_failure_is_the_failures_cost(tmp_path):
    """Also from step 0, where no checkpoint was there yet: the second making of the state is none of a fresh run."""
    events = [(t, e, m | {"step": 0} if e == "restored" else m) for t, e, m in EVENTS]
    total = account(run_of(tmp_path / "r", events, ROWS))
    assert (total.seconds["start"], total.seconds["restore"]) == pytest.approx((3.0, 0.5))
    assert total.failures[0].seconds["restore"] == pytest.approx(0.5)


def test_events_with_fields_of_other_kinds_are_reported_all_the_same(tmp_path):
    """And a cause is text, whatever it holds: markup once raised, or was obeyed."""
    cause = "[/x] [link=http://a]b[/link] \x1b]0;title\x07"
    odd = [
        (117.6, "failure", {"cause": cause}), (118.0, "launch", {}), (119.0, "failure", {}), (119.1, "started", {}),
        (119.2, "restored", {"dropped": 7}), (119.3, "saved", {"stall_s": "a"}), (119.4, "saved", {"stall_s": 10**400}),
        (119.5, "restored", {"dropped": {"steps": "x", "seconds": None, "last": "y"}}), (124.0, "ended", {}),
    ]  # fmt: skip
    run = run_of(tmp_path / "r", [*EVENTS[:5], *odd], [])
    run.metrics_file.write_text('{"step": 1, "time": "x", "step_time_s": [1]}\n{"step": 2}\n')
    out = io.StringIO()
    show(run, make_console(out))
    assert r"[/x] [link=http://a]b[/link] \x1b]0;title\x07" in out.getvalue()
    assert "\x1b" not in out.getvalue()
    assert [f.cause for f in account(run).failures] == [cause, "unknown"]


def test_a_loss_curve_of_damaged_rows_is_drawn(tmp_path):
    rows = [b'{"step": 1, "tokens": 10, "cross_entropy": 2.0}', b"\xff", b'{"step": 2}', b'{"step": 3, "tokens": "x"}',
            b'{"step": 4, "tokens": 40, "cross_entropy": "x", "eval_loss": [1]}']  # fmt: skip
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(rows))
    plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png", "damaged")
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_a_start_that_follows_no_failure_has_cost_nothing(tmp_path):
    later = [(1000.0, "launch", {}), (1001.0, "started", {}), (1002.0, "restored", {"step": 6}), (1003.0, "compiled", {})]
    assert not RunningAccount(run_of(tmp_path / "r", [*EVENTS, *later], ROWS), 6).costs


def test_a_directory_without_events_is_named(tmp_path):
    with pytest.raises(UserError, match=r"has no events.jsonl"):
        account(RunDirectory(tmp_path))
