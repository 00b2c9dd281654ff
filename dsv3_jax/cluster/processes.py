"""Several processes as one run: which take part, a roll call that names the missing ones, and agreement between them.

A launcher sets three environment variables for each process: DSV3_COORDINATOR (host:port of process 0), DSV3_PROCESSES and
DSV3_PROCESS_ID. SLURM, indexed Kubernetes jobs and TPU pods set their own, from which these follow. `scripts/launch/` has a
file for each; `dsv3 launch` starts processes on one machine. DSV3_JOIN_TIMEOUT_S limits how long processes wait for each other
at the start, DSV3_HEARTBEAT_S how long the death of one goes unnoticed.
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
_MESSAGE_BYTES = 512
_DEVICES_S = 30.0  # a host's devices start within this
_THREADS_PER_DEVICE = 8  # measured on two busy cores: with 1, one run in two of data=2 pipe=2 expert=2 hangs; with 8, none of 9
_HEARTBEAT_S = 30.0  # a process that is silent for so long counts as dead; JAX's default is 100


@dataclass(frozen=True)
class ClusterSpec:
    """A run's processes, as one of them sees it."""

    coordinator: str  # host:port
    processes: int  # in the run
    process: int  # this one's number
    timeout_s: float = _TIMEOUT_S
    heartbeat_s: float = _HEARTBEAT_S


def _first_host(nodelist: str) -> str:
    """The first host of SLURM's compressed list, e.g. gpu003 of `gpu[003-007,011],login1`."""
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
    """Seconds from the environment variable `name`, or `default`. Raises `UserError` unless they are a positive number."""
    value = environ.get(name, str(default))
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UserError(f"{name}={value!r} must be a number of seconds")
    return seconds


def cluster_spec(environ: Mapping[str, str]) -> ClusterSpec | None:
    """The processes that the environment describes; None for a single one. Raises `UserError` if it contradicts itself."""
    if "DSV3_PROCESSES" in environ or "DSV3_COORDINATOR" in environ:
        # an indexed Kubernetes job (JobSet's are) numbers its pods
        process = _number(environ, "DSV3_PROCESS_ID", environ.get("JOB_COMPLETION_INDEX"))
        spec = ClusterSpec(environ.get("DSV3_COORDINATOR", ""), _number(environ, "DSV3_PROCESSES"), process)
    elif environ.get("SLURM_STEP_NODELIST") and _number(environ, "SLURM_NTASKS", "1") > 1:
        port = 60000 + _number(environ, "SLURM_JOB_ID") % 4096  # jobs that share a node need ports of their own
        host = _first_host(environ["SLURM_STEP_NODELIST"])
        spec = ClusterSpec(f"{host}:{port}", _number(environ, "SLURM_NTASKS"), _number(environ, "SLURM_PROCID"))
    elif "," in environ.get("TPU_WORKER_HOSTNAMES", ""):
        hosts = environ["TPU_WORKER_HOSTNAMES"].split(",")
        spec = ClusterSpec(f"{hosts[0]}:{_PORT}", len(hosts), _number(environ, "TPU_WORKER_ID"))
    else:
        return None
    if not re.fullmatch(r"[^:\s]+:\d+", spec.coordinator):
        raise UserError(f"DSV3_COORDINATOR={spec.coordinator!r} must be host:port, the address of process 0")
    if spec.process >= spec.processes:
        raise UserError(f"process {spec.process} of {spec.processes}: DSV3_PROCESS_ID runs from 0 to {spec.processes - 1}")
    if spec.processes == 1:
        return None
    timeout = seconds_from("DSV3_JOIN_TIMEOUT_S", _TIMEOUT_S, environ)
    heartbeat = seconds_from("DSV3_HEARTBEAT_S", _HEARTBEAT_S, environ)
    return ClusterSpec(spec.coordinator, spec.processes, spec.process, timeout, heartbeat)


def free_port() -> int:
    """A TCP port that no process of this machine listens on now."""
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


def _address(spec: ClusterSpec) -> tuple[str, int]:
    host, port = spec.coordinator.rsplit(":", 1)
    return host, int(port)


def _missing(spec: ClusterSpec, present: Mapping[int, str]) -> str:
    absent = [str(p) for p in range(spec.processes) if p not in present]
    shown = ", ".join(absent[:16]) + (f" and {len(absent) - 16} more" if len(absent) > 16 else "")
    here = ", ".join(f"{p} on {present[p]}" for p in sorted(present)[:4])
    return (
        f"{len(absent)} of {spec.processes} processes did not join within {spec.timeout_s:.0f} s: missing {shown}; joined: "
        f"{here}{', ...' if len(present) > 4 else ''}; look at their logs, or set DSV3_JOIN_TIMEOUT_S"
    )


def _line(connection: socket.socket) -> str:
    """Read one line of a few hundred bytes; '' if the other side has closed the connection."""
    data = b""
    while not data.endswith(b"\n") and len(data) < 8192:
        piece = connection.recv(4096)
        if not piece:
            return ""
        data += piece
    return data.decode(errors="replace")


def _take_roll(spec: ClusterSpec, deadline: float) -> None:
    """On process 0: wait until every process has reported, then send all of them the outcome."""
    host, port = _address(spec)
    present, connections, verdict = {0: socket.gethostname()}, [], ""
    with socket.create_server((host, port), backlog=spec.processes) as server:
        while len(present) < spec.processes and not verdict:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection, _ = server.accept()
                connection.settimeout(max(deadline - time.monotonic(), 0.01))
                name = json.loads(_line(connection))
                process, processes = int(name["process"]), int(name["processes"])
                if processes != spec.processes:
                    verdict = f"process {process} was started as one of {processes}, this run has {spec.processes}"
                elif process in present:
                    verdict = f"two processes have DSV3_PROCESS_ID={process}: on {present[process]} and on {name['host']}"
                present[process] = str(name["host"])
                connections.append(connection)
            except TimeoutError:
                verdict = _missing(spec, present)
            except (ValueError, KeyError, TypeError):
                continue  # no process of a run
        for connection in connections:
            with connection:
                connection.sendall((json.dumps({"verdict": verdict}) + "\n").encode())
    if verdict:
        raise UserError(verdict)


def _answer_roll(spec: ClusterSpec, deadline: float) -> None:
    """On the others: report to process 0, and wait for the outcome."""
    name = {"process": spec.process, "processes": spec.processes, "host": socket.gethostname()}
    reason = "no answer"
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(_address(spec), timeout=5) as connection:
                connection.sendall((json.dumps(name) + "\n").encode())
                # process 0 gives up at its own deadline, which may lie after ours
                connection.settimeout(max(deadline - time.monotonic(), 0.01) + spec.timeout_s)
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
        f"process {spec.process} of {spec.processes}: process 0 at {spec.coordinator} did not answer "
        f"within {spec.timeout_s:.0f} s ({reason}): it is missing, or DSV3_COORDINATOR is wrong"
    )


def give_threads() -> None:
    """Give XLA enough threads for the collectives of virtual CPU devices. Call it before anything touches a device.

    XLA's CPU client starts collectives that do not depend on each other in any order. Each blocks a thread of a pool that has
    one thread per device: if devices start them in different orders, no thread is left and all wait for ever.
    """
    if (devices := jax.config.jax_num_cpu_devices) > 1:
        os.environ.setdefault("NPROC", str(_THREADS_PER_DEVICE * devices))  # the size of XLA's pools


def join(environ: Mapping[str, str] = os.environ) -> None:
    """Become one of a run's processes, if the environment says so. Call it before anything touches a device.

    Raises `UserError`, naming the missing processes, if not all join within DSV3_JOIN_TIMEOUT_S. Aborts with a traceback if
    start-up stalls after that.
    """
    give_threads()
    spec = cluster_spec(environ)
    if spec is None or jax.distributed.is_initialized():
        return
    deadline = time.monotonic() + spec.timeout_s
    # JAX waits much longer for its peers' devices, so that a process stuck there would go unnoticed
    faulthandler.dump_traceback_later(2 * spec.timeout_s + _DEVICES_S, exit=True, file=sys.__stderr__ or sys.stderr)
    try:
        (_take_roll if spec.process == 0 else _answer_roll)(spec, deadline)
        jax.distributed.initialize(
            spec.coordinator, spec.processes, spec.process, initialization_timeout=max(int(spec.timeout_s), 10),
            heartbeat_timeout_seconds=max(int(spec.heartbeat_s), 1),
        )  # fmt: skip
        jax.devices()
    finally:
        faulthandler.cancel_dump_traceback_later()


def is_first() -> bool:
    """Whether this is process 0, which writes what a run writes once."""
    return jax.process_index() == 0


def on_first[T](f: Callable[[], T]) -> T | None:
    """Call `f` on process 0 only, before any process goes on; returns its result there and None elsewhere.

    If it raises, the other processes raise `FailedElsewhere`.
    """
    if jax.process_count() == 1:
        return f()
    result, failure = None, None
    if is_first():
        try:
            result = f()
        except Exception as error:  # whatever it is, the others wait for the outcome
            failure = error
    failed = multihost_utils.broadcast_one_to_all(np.asarray(failure is not None))
    if failure is not None:
        raise failure
    if failed:
        raise FailedElsewhere
    return result


def broadcast_from_first(f: Callable[[], int]) -> int:
    """Call `f` on process 0 and return its result on every process. If it raises, all end."""
    result = on_first(f) or 0
    return result if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.asarray(result)))


def first_nonempty(text: str) -> str:
    """On every process, the text of the first process whose text is not empty, cut to 512 bytes; '' if all are."""
    if jax.process_count() == 1:
        return text
    mine = np.zeros(_MESSAGE_BYTES, np.uint8)
    data = np.frombuffer(text.encode()[:_MESSAGE_BYTES], np.uint8)
    mine[: len(data)] = data
    texts = [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in np.asarray(multihost_utils.process_allgather(mine))]
    return next(filter(None, texts), "")


def agree(stop: bool, save: bool) -> tuple[bool, bool]:
    """(whether any process wants to stop, whether process 0 wants to save): the same answer everywhere."""
    if jax.process_count() == 1:
        return stop, save
    flags = np.asarray(multihost_utils.process_allgather(np.asarray([stop, save])))
    return bool(flags[:, 0].any()), bool(flags[0, 1])
