"""Several processes as one run: who takes part, a roll call that says who is missing, and agreement between them.

A launcher tells each process three things by environment: DSV3_COORDINATOR (host:port of process 0), DSV3_PROCESSES and
DSV3_PROCESS_ID. SLURM, indexed Kubernetes jobs and TPU pods set their own, from which these follow. `scripts/launch/` has a
file for each; `dsv3 launch` starts processes on one machine. DSV3_JOIN_TIMEOUT_S bounds the start, DSV3_HEARTBEAT_S for how
long a peer that has died goes unnoticed.
"""

import faulthandler
import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import multihost_utils

from dsv3_jax.errors import FailedElsewhere, UserError

_PORT = 8476  # JAX's own choice for TPU pods
_TIMEOUT_S = 300.0  # a large job's containers may start minutes apart
_COMPLAINT_BYTES = 512
_DEVICES_S = 30.0  # for a host's devices to start
_THREADS_A_DEVICE = 8  # measured on two busy cores: with 1, one run in two of data=2 pipe=2 expert=2 hangs; with 8, none of 9
_HEARTBEAT_S = 30.0  # a process that says nothing for so long is dead; JAX's default is 100


@dataclass(frozen=True)
class Place:
    """One process's place in a run."""

    coordinator: str  # host:port
    processes: int
    process: int
    timeout_s: float = _TIMEOUT_S
    heartbeat_s: float = _HEARTBEAT_S


def _first_host(nodelist: str) -> str:
    """SLURM's compressed list, `gpu[003-007,011],login1`: its first host."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", nodelist)
    if match is None:
        raise UserError(f"SLURM_STEP_NODELIST={nodelist!r} names no host")
    return match[1] + (match[2] or "")


def _number(environ: Mapping[str, str], name: str, default: str | None = None) -> int:
    value = environ.get(name, default)
    if value is None or not value.isdigit():
        raise UserError(f"{name}={value!r} must be a number; see scripts/launch/ for what to set")
    return int(value)


def seconds_from(name: str, default: float, environ: Mapping[str, str] = os.environ) -> float:
    """A positive number of seconds that the environment may set. Raises `UserError` for what is none."""
    value = environ.get(name, str(default))
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UserError(f"{name}={value!r} must be a number of seconds")
    return seconds


def place_from(environ: Mapping[str, str]) -> Place | None:
    """As the environment describes it; None for a single process. Raises `UserError` if it contradicts itself."""
    if "DSV3_PROCESSES" in environ or "DSV3_COORDINATOR" in environ:
        # an indexed Kubernetes job (JobSet's are) numbers its pods
        process = _number(environ, "DSV3_PROCESS_ID", environ.get("JOB_COMPLETION_INDEX"))
        place = Place(environ.get("DSV3_COORDINATOR", ""), _number(environ, "DSV3_PROCESSES"), process)
    elif environ.get("SLURM_STEP_NODELIST") and _number(environ, "SLURM_NTASKS", "1") > 1:
        port = 60000 + _number(environ, "SLURM_JOB_ID") % 4096  # jobs that share a node need ports of their own
        host = _first_host(environ["SLURM_STEP_NODELIST"])
        place = Place(f"{host}:{port}", _number(environ, "SLURM_NTASKS"), _number(environ, "SLURM_PROCID"))
    elif "," in environ.get("TPU_WORKER_HOSTNAMES", ""):
        hosts = environ["TPU_WORKER_HOSTNAMES"].split(",")
        place = Place(f"{hosts[0]}:{_PORT}", len(hosts), _number(environ, "TPU_WORKER_ID"))
    else:
        return None
    if not re.fullmatch(r"[^:\s]+:\d+", place.coordinator):
        raise UserError(f"DSV3_COORDINATOR={place.coordinator!r} must be host:port, the address of process 0")
    if place.process >= place.processes:
        raise UserError(f"process {place.process} of {place.processes}: DSV3_PROCESS_ID runs from 0 to {place.processes - 1}")
    if place.processes == 1:
        return None
    timeout = seconds_from("DSV3_JOIN_TIMEOUT_S", _TIMEOUT_S, environ)
    heartbeat = seconds_from("DSV3_HEARTBEAT_S", _HEARTBEAT_S, environ)
    return Place(place.coordinator, place.processes, place.process, timeout, heartbeat)


def free_port() -> int:
    """One that nobody on this machine listens at now."""
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


def _address(place: Place) -> tuple[str, int]:
    host, port = place.coordinator.rsplit(":", 1)
    return host, int(port)


def _missing(place: Place, present: Mapping[int, str]) -> str:
    absent = [str(p) for p in range(place.processes) if p not in present]
    shown = ", ".join(absent[:16]) + (f" and {len(absent) - 16} more" if len(absent) > 16 else "")
    here = ", ".join(f"{p} on {present[p]}" for p in sorted(present)[:4])
    return (
        f"{len(absent)} of {place.processes} processes did not join within {place.timeout_s:.0f} s: missing {shown}; joined: "
        f"{here}{', ...' if len(present) > 4 else ''}; look at their logs, or set DSV3_JOIN_TIMEOUT_S"
    )


def _line(connection: socket.socket) -> str:
    """One line of a few hundred bytes; '' if the other side has gone."""
    data = b""
    while not data.endswith(b"\n") and len(data) < 8192:
        piece = connection.recv(4096)
        if not piece:
            return ""
        data += piece
    return data.decode(errors="replace")


def _take_roll(place: Place, deadline: float) -> None:
    """Process 0: wait for everybody's name, then tell them all the outcome."""
    host, port = _address(place)
    present, connections, verdict = {0: socket.gethostname()}, [], ""
    with socket.create_server((host, port), backlog=place.processes) as server:
        while len(present) < place.processes and not verdict:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection, _ = server.accept()
                connection.settimeout(max(deadline - time.monotonic(), 0.01))
                name = json.loads(_line(connection))
                process, of = int(name["process"]), int(name["processes"])
                if of != place.processes:
                    verdict = f"process {process} was started as one of {of}, this run has {place.processes}"
                elif process in present:
                    verdict = f"two processes have DSV3_PROCESS_ID={process}: on {present[process]} and on {name['host']}"
                present[process] = str(name["host"])
                connections.append(connection)
            except TimeoutError:
                verdict = _missing(place, present)
            except (ValueError, KeyError, TypeError):
                continue  # not one of ours
        for connection in connections:
            with connection:
                connection.sendall((json.dumps({"verdict": verdict}) + "\n").encode())
    if verdict:
        raise UserError(verdict)


def _answer_roll(place: Place, deadline: float) -> None:
    name = {"process": place.process, "processes": place.processes, "host": socket.gethostname()}
    reason = "no answer"
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(_address(place), timeout=5) as connection:
                connection.sendall((json.dumps(name) + "\n").encode())
                # process 0 gives up at its own deadline, which may lie after ours
                connection.settimeout(max(deadline - time.monotonic(), 0.01) + place.timeout_s)
                answer = _line(connection)
            if answer:
                verdict = json.loads(answer)["verdict"]
                if verdict:
                    raise UserError(verdict)
                return
            reason = "it closed the connection"
        except OSError as error:
            reason = error.strerror or str(error)
        time.sleep(0.2)
    raise UserError(
        f"process {place.process} of {place.processes}: process 0 at {place.coordinator} did not answer "
        f"within {place.timeout_s:.0f} s ({reason}): it is missing, or DSV3_COORDINATOR is wrong"
    )


def give_threads() -> None:
    """Threads for all collectives that virtual CPU devices may wait in at once. Call it before anything touches a device.

    XLA's CPU client starts collectives that do not depend on each other in any order, each blocks a thread of one pool, and the
    pool has one for each device: with another order on another device, all wait for ever once none is left.
    """
    if (devices := jax.config.jax_num_cpu_devices) > 1:
        os.environ.setdefault("NPROC", str(_THREADS_A_DEVICE * devices))  # the size of XLA's pools


def join(environ: Mapping[str, str] = os.environ) -> None:
    """Become one of a run's processes, if the environment says so. Call it before anything touches a device.

    Raises `UserError` within the timeout, naming who is missing, if not all of them come. Who hangs here ends itself.
    """
    give_threads()
    place = place_from(environ)
    if place is None or jax.distributed.is_initialized():
        return
    deadline = time.monotonic() + place.timeout_s
    # JAX waits for its peers' devices much longer; one that is stuck there would not be noticed before
    faulthandler.dump_traceback_later(2 * place.timeout_s + _DEVICES_S, exit=True, file=sys.__stderr__ or sys.stderr)
    try:
        (_take_roll if place.process == 0 else _answer_roll)(place, deadline)
        jax.distributed.initialize(
            place.coordinator, place.processes, place.process, initialization_timeout=max(int(place.timeout_s), 10),
            heartbeat_timeout_seconds=max(int(place.heartbeat_s), 1),
        )  # fmt: skip
        jax.devices()
    finally:
        faulthandler.cancel_dump_traceback_later()


def is_first() -> bool:
    return jax.process_index() == 0


def on_first[T](f: Callable[[], T]) -> T | None:
    """f() on process 0 only, before anyone goes on. If it raises, the other processes end too."""
    if jax.process_count() == 1:
        return f()
    result, failure = None, None
    if is_first():
        try:
            result = f()
        except Exception as error:  # whatever it is: the others are waiting for word
            failure = error
    failed = multihost_utils.broadcast_one_to_all(np.asarray(failure is not None))
    if failure is not None:
        raise failure
    if failed:
        raise FailedElsewhere
    return result


def first_says(f: Callable[[], int]) -> int:
    """f() of process 0, on every process. If it raises, all end."""
    said = on_first(f) or 0
    return said if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.asarray(said)))


def first_complaint(text: str) -> str:
    """The text of the first process that has one, cut to some hundred bytes, on every process; '' if none has."""
    if jax.process_count() == 1:
        return text
    mine = np.zeros(_COMPLAINT_BYTES, np.uint8)
    data = np.frombuffer(text.encode()[:_COMPLAINT_BYTES], np.uint8)
    mine[: len(data)] = data
    texts = [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in np.asarray(multihost_utils.process_allgather(mine))]
    return next(filter(None, texts), "")


def agree(stop: bool, save: bool) -> tuple[bool, bool]:
    """(whether any process wants to stop, whether process 0 wants to save): the same answer everywhere."""
    if jax.process_count() == 1:
        return stop, save
    flags = np.asarray(multihost_utils.process_allgather(np.asarray([stop, save])))
    return bool(flags[:, 0].any()), bool(flags[0, 1])
