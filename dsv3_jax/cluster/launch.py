"""`dsv3 launch`: several processes of one run on this machine's CPU, for trying out what a cluster will do."""

import os
import signal
import subprocess
import sys
import threading
import time
from typing import IO

from dsv3_jax.cluster.processes import free_port
from dsv3_jax.cluster.roll_call import new_token
from dsv3_jax.cluster.stop import stop_signals
from dsv3_jax.errors import UserError
from dsv3_jax.streams import say

_GRACE_S = 10.0  # for the others to end by themselves once one has failed
_MOST = 1024  # processes, and devices of each: beyond what any machine runs


def launch(command: list[str], processes: int, devices: int) -> int:
    """Run `dsv3 COMMAND` in several processes on this machine's CPU. The first failure ends all; signals to stop go to all.

    Args:
        command: A verb of `dsv3` and its arguments.
        processes: How many processes.
        devices: Virtual CPU devices of each process.

    Returns:
        The exit code of the process that failed first, or 0.
    """
    if not 1 <= processes <= _MOST or not 1 <= devices <= _MOST:
        raise UserError(f"--processes {processes} --devices {devices}: use 1 to {_MOST:,} of each")
    shared = os.environ | {
        "DSV3_COORDINATOR": f"127.0.0.1:{free_port()}",
        "DSV3_PROCESSES": str(processes),
        "DSV3_JOIN_TOKEN": new_token(),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
    }
    program = [sys.executable, "-m", "dsv3_jax", *command]
    running = [
        subprocess.Popen(
            program, env=shared | {"DSV3_PROCESS_ID": str(i)}, stdout=subprocess.DEVNULL if i else subprocess.PIPE, text=True,
            errors="replace", start_new_session=True,  # signals of the terminal come from here alone, once
        )
        for i in range(processes)
    ]  # fmt: skip
    # Gloo, which connects CPU processes, prints every connection to standard output
    copier = threading.Thread(target=_copy_without_gloo, args=(running[0].stdout,), daemon=True)
    copier.start()

    def pass_on(number: int, _frame) -> None:
        for process in running:
            if process.poll() is None:
                process.send_signal(number)

    old = {number: signal.signal(number, pass_on) for number in stop_signals()}
    try:
        code = _wait(running)
        copier.join(_GRACE_S)
        return code
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _copy_without_gloo(lines: IO[str]) -> None:
    for line in lines:
        if not line.startswith("[Gloo]"):
            say(line.rstrip("\n"))


def _wait(running: list[subprocess.Popen]) -> int:
    failed_at, code = None, 0
    while any(process.poll() is None for process in running):
        failures = [process.returncode for process in running if process.poll()]
        if failures and failed_at is None:
            failed_at, code = time.monotonic(), failures[0]
        if failed_at is not None and time.monotonic() - failed_at > _GRACE_S:
            for process in running:
                if process.poll() is None:
                    process.kill()
        time.sleep(0.1)
    code = code or next((p.returncode for p in running if p.returncode), 0)
    return code if code >= 0 else 128 - code  # as shells report a signal
