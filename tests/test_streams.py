"""Standard streams: whatever becomes of who reads them, nothing that is being done ends; and no file gets their numbers."""

import contextlib
import errno
import io
import os
import subprocess
import sys

import pytest

from dsv3_jax import streams
from dsv3_jax.progress import ProgressReporter, make_console
from dsv3_jax.streams import Forgiving, forgiving_streams
from tests.conftest import ROOT


def without_reader() -> io.TextIOWrapper:
    """A pipe of which nobody reads any more."""
    reading, writing = os.pipe()
    os.close(reading)
    return open(writing, "w")


def dead_terminal() -> io.TextIOWrapper:
    terminal, stream = os.openpty()
    os.close(terminal)
    return open(stream, "w")


@pytest.mark.parametrize("broken", [without_reader, dead_terminal])
def test_a_reader_that_goes_ends_nothing(broken):
    """What is printed afterwards goes to /dev/null, what is still in a buffer and what native code prints included."""
    with broken() as stream:
        out = Forgiving(stream)
        for _ in range(3):
            print("text", file=out, flush=True)
        assert os.path.samestat(os.fstat(stream.fileno()), os.stat(os.devnull))
        assert out.lost is None


@pytest.mark.parametrize("broken", [without_reader, dead_terminal])
def test_progress_ends_nothing(broken, monkeypatch):
    """Rich's own way is to exit with code 1."""
    with broken() as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with ProgressReporter(steps=2, done=0) as progress:
            progress.say("compiling")
            progress.update(1, {"loss": 1.5, "tokens_per_s": 2e6, "max_load": 1.25, "step_time_s": 3.0}, 5e12)
        make_console().print("a table")
        streams.say("the end")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
def test_what_a_full_disk_has_cost_is_known():
    """And the interpreter's own flush at the end finds nothing that could fail."""
    with open("/dev/full", "w") as stream:
        out = Forgiving(stream)
        print("a result", file=out)
        assert out.lost is None  # it is in the buffer
        out.end()
        assert out.lost is not None
        assert out.lost.errno == errno.ENOSPC


def test_a_terminal_of_another_encoding_gets_escapes():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="latin-1", line_buffering=True)
    print("Größe 模", file=Forgiving(stream))
    assert raw.getvalue() == b"Gr\xf6\xdfe \\u6a21\n"


def test_streams_of_a_command_are_put_back(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it where standard output was closed
    before = sys.stdout, sys.stderr
    with contextlib.suppress(ZeroDivisionError), forgiving_streams() as out:
        print("into nothing")
        out.write("nor this")
        1 / 0  # noqa: B018
    assert sys.stderr is before[1]
    print("into nothing, too")


def test_no_file_gets_the_number_of_a_stream_that_is_closed(tmp_path):
    program = f"""if 1:
        import os, sys
        from dsv3_jax.streams import forgiving_streams
        with forgiving_streams(), open({str(tmp_path / "found")!r}, "w") as file:
            print("to standard output", flush=True)
            print("to standard error", file=sys.stderr, flush=True)
            os.write(1, b"by native code")
            inherited = all(os.get_inheritable(n) for n in (0, 1, 2))
            file.write(f"{{file.fileno() > 2}} {{inherited}} {{sys.stdin.read()!r}} {{sys.__stderr__ is not None}}")"""
    command = f'exec "{sys.executable}" -c "$PROGRAM" <&- >&- 2>&-'
    done = subprocess.run(["sh", "-c", command], env=os.environ | {"PROGRAM": program, "PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 0
    assert (tmp_path / "found").read_text() == "True True '' True"
