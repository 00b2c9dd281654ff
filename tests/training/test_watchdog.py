"""Stuck processes end themselves, whatever they hang in; processes that make steps do not."""

import subprocess
import sys
import time

import pytest

from dsv3_jax.training import watchdog
from tests.conftest import ROOT

HANGS = {
    "in Python": "while True: pass",
    "asleep": "time.sleep(60)",
    "in native code that holds the interpreter lock": "ctypes.PyDLL(None).sleep(60)",
}


def run(tmp_path, code: str) -> tuple[subprocess.CompletedProcess, float]:
    program = (
        "import ctypes, time\nfrom pathlib import Path\nfrom dsv3_jax.training.watchdog import Watchdog\n"
        f"dog = Watchdog(0.5, 5.0)\ndog.slow(Path({str(tmp_path / 'deadline')!r}))\n{code}"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True, cwd=ROOT, timeout=50)
    return done, time.monotonic() - began


@pytest.mark.parametrize("hang", HANGS.values(), ids=HANGS.keys())
def test_a_stuck_process_ends_and_says_where(tmp_path, hang):
    done, seconds = run(tmp_path, f"def a_step():\n    {hang}\ndog.step_ended(0.01)\na_step()")
    assert done.returncode == 1
    assert "Timeout (" in done.stderr
    assert "in a_step" in done.stderr
    assert seconds < 20  # of which half a second is the bound, the rest Python's start
    assert time.time() - 20 < float((tmp_path / "deadline").read_text()) <= time.time() + 0.1  # it is rounded


def test_a_step_after_something_slow_has_a_steps_time(tmp_path):
    """A save that has begun lets the next step run; a first step, which nothing was timed before, has the slow one's."""
    first = "dog.step_begins(); time.sleep(1); dog.step_ended(0.01)\n"
    done, _ = run(tmp_path, first + "dog.slow(); dog.step_begins(); time.sleep(4)")
    assert done.returncode == 1
    assert "Timeout (0:00:00.5" in done.stderr


def test_how_long_a_step_may_take(monkeypatch):
    """Ten medians, but the floor at least; what is slow by nature has its own time."""
    allowed = []
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda seconds, **_: allowed.append(seconds))
    dog = watchdog.Watchdog(stuck_after_s=30.0, slow_s=500.0)
    for seconds in (1.0, 2.0, 90.0, 7.0):
        dog.step_ended(seconds)
    dog.slow()
    assert allowed == [500, 30, 30, 30, 45, 500]


def test_nothing_is_allowed_for_where_nobody_knows_how_long_it_takes(monkeypatch):
    """While a corpus is tokenised, no clock runs; it does again afterwards, as for other slow things."""
    clock = []
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda seconds, **_: clock.append(seconds))
    monkeypatch.setattr(watchdog.faulthandler, "cancel_dump_traceback_later", lambda: clock.append("off"))
    with watchdog.Watchdog(stuck_after_s=30.0, slow_s=500.0).paused():
        assert clock == [500, "off"]
    assert clock == [500, "off", 500]


def test_steps_and_slow_things_are_left_alone(tmp_path):
    steps = "for _ in range(5): time.sleep(0.2); dog.step_ended(0.2)\n"
    slow = "dog.slow(); time.sleep(1.5)\n"  # longer than a step may take
    longer = "time.sleep(1.0); dog.step_ended(1.0)\n"  # ten medians of 0.2 are more than half a second
    done, _ = run(tmp_path, steps + slow + "dog.step_ended(0.2)\n" + longer + "dog.__exit__(); time.sleep(1.0); print('well')")
    assert done.stdout == "well\n", done.stderr
    assert not (tmp_path / "deadline").exists()


def test_a_time_beyond_the_clocks_is_no_limit():
    with watchdog.Watchdog(1e300, 1.0) as dog:
        dog.step_ended(0.1)
