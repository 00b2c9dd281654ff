"""A host of a supervised run: a process that has imported everything and forks workers, so that a new one starts at once.

Run by `python -m dsv3_jax.elastic.host`. Standard input takes one JSON object a line,
{"start": {"entry", "args", "environ", "log"}} or {"signal": number}; standard output gives {"ready": pid},
{"pid": of the worker}, {"exit": code of the worker, "reason": why it failed, in one line}. No device and no thread is opened
before the fork. The worker ends with the host, and the host with its standard input. Linux only.
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

from dsv3_jax.errors import EXIT_BAD_INPUT, EXIT_NOT_JOINED, EXIT_STOPPED, Refused, UserError, os_error_line
from dsv3_jax.progress import one_line
from dsv3_jax.streams import say

_PR_SET_PDEATHSIG = 1
_REASON_BYTES = 2048  # less than a pipe holds, so that no worker waits for its host to read


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


def serve() -> tuple[dict[str, Any], int] | None:
    """Fork a worker for each start command until standard input ends.

    Returns None in the host, and in each worker the start command and the descriptor to which it may write why it failed.
    """
    worker, worker_fd, reason_fd = 0, [], -1
    for command in _commands(worker_fd):
        if command is None:
            _, status = os.waitpid(worker, 0)
            os.close(worker_fd.pop())
            _say({"exit": os.waitstatus_to_exitcode(status), "reason": _read_reason(reason_fd)})
        elif "start" in command:
            host = os.getpid()
            reason_fd, write_fd = os.pipe()
            with warnings.catch_warnings():  # the threads that imports leave (of malloc, of BLAS) are made for forks
                warnings.simplefilter("ignore", DeprecationWarning)
                worker = os.fork()
            if worker == 0:
                _end_with(host)
                return command["start"], write_fd
            os.close(write_fd)
            worker_fd.append(os.pidfd_open(worker))
            _say({"pid": worker})
        elif worker_fd:
            os.kill(worker, command["signal"])
    if worker_fd:
        os.kill(worker, signal.SIGKILL)
    return None


def _read_reason(reason_fd: int) -> str:
    """What a worker that has ended wrote; a process that it left behind may still hold the other end open."""
    os.set_blocking(reason_fd, False)
    try:
        return os.read(reason_fd, _REASON_BYTES).decode(errors="replace")
    except BlockingIOError:
        return ""
    finally:
        os.close(reason_fd)


def _end_with(host: int) -> None:
    """Have the kernel kill this process when its host ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != host:
        os._exit(1)


def _work(start: dict[str, Any]) -> tuple[int, str]:
    """Become one of the run's processes and call the entry point that `start` names. Returns its exit code and the reason."""
    try:
        log = os.open(start["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        return EXIT_BAD_INPUT, os_error_line(error)
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
    except UserError as error:
        say(f"dsv3: error: {error}")
        return EXIT_NOT_JOINED, str(error)
    except (OSError, RuntimeError) as error:  # JAX's own failures are RuntimeErrors
        return EXIT_NOT_JOINED, _with_traceback(error)
    try:
        main(start["args"])
    except Refused as end:
        return EXIT_BAD_INPUT, end.line
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1, ""
    except Exception as error:
        return 1, _with_traceback(error)
    return 0, ""


def _with_traceback(error: Exception) -> str:
    """Print the traceback into the log. Returns the error in one line."""
    with contextlib.suppress(OSError):  # the log's disk may be full
        traceback.print_exception(error)
    return f"{type(error).__name__}: {error}"


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the supervisor's
    _import_all()
    _say({"ready": os.getpid()})
    started = serve()
    if started is None:
        return
    (start, reason_fd), code = started, 1
    try:
        code, reason = _work(start)
        if reason:
            os.write(reason_fd, one_line(reason).encode(errors="replace")[:_REASON_BYTES])
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
