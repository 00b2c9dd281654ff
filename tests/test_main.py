"""Ctrl-C outside of a command, where Python itself would print a traceback."""

import signal
import subprocess
import sys

import pytest

INTERRUPT = "import os, signal, sys; stop = lambda *_: os.kill(os.getpid(), signal.SIGINT)"
MAIN = "from dsv3_jax.__main__ import main; main()"
DURING_IMPORT = "sys.meta_path.insert(0, type('F', (), {'find_spec': lambda name, *_: stop() if name == 'tyro' else None}))"
DURING_THE_END = "import atexit; atexit.register(stop)"


def run(*lines: str) -> subprocess.CompletedProcess:
    """Python with a command line that is refused, in a second."""
    command = [sys.executable, "-c", "; ".join(lines), "train", "nowhere.yaml"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("moment", [DURING_IMPORT, f"from dsv3_jax import cli; cli.main = str; {DURING_THE_END}"])
def test_an_interrupt_outside_of_the_command_ends_at_once(moment):
    done = run(INTERRUPT, moment, MAIN)
    assert done.returncode == -signal.SIGINT
    assert done.stderr == ""


def test_an_interrupt_that_is_ignored_stays_so():
    done = run(INTERRUPT, "signal.signal(signal.SIGINT, signal.SIG_IGN)", DURING_IMPORT, MAIN)
    assert done.returncode == 2
    assert "nowhere.yaml" in done.stderr


def test_an_interrupt_of_the_command_is_the_command_s():
    done = run(INTERRUPT, "from dsv3_jax import cli; cli.load_config = stop", MAIN)
    assert done.returncode == 130
    assert done.stderr == "dsv3: stopped\n"
