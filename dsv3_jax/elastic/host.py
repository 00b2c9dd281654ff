"""A host of a supervised run: a process that has imported everything and forks workers, so that a new one starts at once.

Run by `python -m dsv3_jax.elastic.host`. Standard input takes one JSON object a line,
{"start": {"entry", "args", "environ", "log"}} or {"signal": number}; standard output gives {"ready": pid},
{"pid": of the worker}, {"exit": code of the worker}. No device and no thread is opened before the fork. The worker ends with
the host, and the host with its standard input. Linux only.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

from dsv3_jax.errors import EXIT_NOT_JOINED, EXIT_STOPPED, UserError

_PR_SET_PDEATHSIG = 1


def _import_all() -> None:
    """Import what `dsv3 train` does, once for all workers: it takes some seconds."""
    import dsv3_jax.training.finish
    import dsv3_jax.training.loop
    import dsv3_jax.training.resolve  # noqa: F401

    gc.collect()
    gc.freeze()  # so that a worker's collections leave the pages that it shares with its host


def _say(what: dict[str, Any]) -> None:
    os.write(1, (json.dumps(what) + "\n").encode())


def _commands(worker_fd: list[int]) -> Iterator[dict[str, Any] | None]:
    """Commands as they come; None when the worker whose descriptor is in `worker_fd` has ended."""
    buffer = b""
    while True:
        readable, _, _ = select.select([0, *worker_fd], [], [])
        if worker_fd and worker_fd[0] in readable:
            yield None
        if 0 in readable:
            data = os.read(0, 65536)
            if not data:
                return
            *lines, buffer = (buffer + data).split(b"\n")
            yield from (json.loads(line) for line in lines)


def serve() -> dict[str, Any] | None:
    """Fork a worker for each start command until standard input ends.

    Returns None in the host, and in each worker the start command.
    """
    worker, worker_fd = 0, []
    for command in _commands(worker_fd):
        if command is None:
            _, status = os.waitpid(worker, 0)
            os.close(worker_fd.pop())
            _say({"exit": os.waitstatus_to_exitcode(status)})
        elif "start" in command:
            host = os.getpid()
            with warnings.catch_warnings():  # the threads that imports leave (of malloc, of BLAS) are made for forks
                warnings.simplefilter("ignore", DeprecationWarning)
                worker = os.fork()
            if worker == 0:
                _end_with(host)
                return command["start"]
            worker_fd.append(os.pidfd_open(worker))
            _say({"pid": worker})
        elif worker_fd:
            os.kill(worker, command["signal"])
    if worker_fd:
        os.kill(worker, signal.SIGKILL)
    return None


def _end_with(host: int) -> None:
    """Have the kernel kill this process when its host ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != host:
        os._exit(1)


def _work(start: dict[str, Any]) -> int:
    """Become one of the run's processes and call the entry point that `start` names. Returns its exit code."""
    log = os.open(start["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(start["environ"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from dsv3_jax.cluster.processes import join

    module, _, function = start["entry"].partition(":")
    main = getattr(importlib.import_module(module), function)

    try:
        join()
    except (UserError, OSError, RuntimeError) as error:  # JAX's own failures are RuntimeErrors
        traceback.print_exception(error)
        return EXIT_NOT_JOINED
    try:
        main(start["args"])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the supervisor's
    _import_all()
    _say({"ready": os.getpid()})
    start = serve()
    if start is None:
        return
    code = 1
    try:
        code = _work(start)
    finally:
        if code not in (0, EXIT_STOPPED):
            # at the interpreter's end JAX waits for the other processes, and they wait for this one's part in a collective
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError):  # the log's disk may be full
                    stream.flush()
            os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
