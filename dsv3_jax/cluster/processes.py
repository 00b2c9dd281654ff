"""Several processes as one run: which take part, how they join, and agreement between them.

A launcher sets three environment variables for each process: DSV3_COORDINATOR (host:port of process 0), DSV3_PROCESSES and
DSV3_PROCESS_ID. SLURM, indexed Kubernetes jobs and TPU pods set their own, from which these follow. `scripts/launch/` has a
file for each; `dsv3 launch` starts processes on one machine. DSV3_JOIN_TIMEOUT_S limits how long processes wait for each other
at the start, DSV3_HEARTBEAT_S how long the death of one goes unnoticed, and DSV3_JOIN_TOKEN keeps strangers out (roll_call.py).
"""

import faulthandler
import hashlib
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import jax
import numpy as np
from jax.experimental import multihost_utils

from dsv3_jax.checks import shortened
from dsv3_jax.cluster.limits import MOST_PROCESSES
from dsv3_jax.cluster.roll_call import ClusterSpec, answer_roll, take_roll
from dsv3_jax.errors import FailedElsewhere, UserError

_PORT = 8476  # JAX's own choice for TPU pods
_MESSAGE_BYTES = 512
_LONGEST_S = 1e6  # twice as much is the longest that a socket waits
_DEVICES_S = 30.0  # a host's devices start within this
_THREADS_PER_DEVICE = 8  # measured on two busy cores: with 1, one run in two of data=2 pipe=2 expert=2 hangs; with 8, none of 9


def _first_host(nodelist: str) -> str:
    """The first host of SLURM's compressed list, e.g. gpu003 of `gpu[003-007,011],login1`."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", nodelist)
    if match is None:
        raise UserError(f"SLURM_STEP_NODELIST={nodelist!r} names no host")
    return match[1] + (match[2] or "")


def _number(environ: Mapping[str, str], name: str, default: str | None = None) -> int:
    value = environ.get(name, default)
    if value is None or not re.fullmatch(r"[0-9]{1,18}", value):
        raise UserError(f"{name}={shortened(value)} must be a number; see scripts/launch/ for what to set")
    return int(value)


def seconds_from(name: str, default: float, environ: Mapping[str, str] = os.environ) -> float:
    """Seconds from the environment variable `name`, or `default`. Raises `UserError` unless they are in (0, 10^6]."""
    value = environ.get(name, str(default))
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= _LONGEST_S:
        raise UserError(f"{name}={shortened(value)} must be a number of seconds, at most {_LONGEST_S:,.0f}")
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
    port = re.fullmatch(r"[^:\s]+:([0-9]{1,5})", spec.coordinator)
    if port is None or not 1 <= int(port[1]) < 2**16:
        raise UserError(f"DSV3_COORDINATOR={shortened(spec.coordinator)} must be host:port, the address of process 0")
    if not 1 <= spec.processes <= MOST_PROCESSES:
        raise UserError(f"DSV3_PROCESSES={spec.processes}: a run has 1 to {MOST_PROCESSES:,} processes")
    if spec.process >= spec.processes:
        raise UserError(f"process {spec.process} of {spec.processes}: DSV3_PROCESS_ID runs from 0 to {spec.processes - 1}")
    if spec.processes == 1:
        return None
    return replace(
        spec, token=environ.get("DSV3_JOIN_TOKEN", ""), timeout_s=seconds_from("DSV3_JOIN_TIMEOUT_S", spec.timeout_s, environ),
        heartbeat_s=seconds_from("DSV3_HEARTBEAT_S", spec.heartbeat_s, environ),
    )  # fmt: skip


def free_port() -> int:
    """A TCP port that no process of this machine listens on now."""
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


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
        bound = None
        if spec.process == 0:
            bound = take_roll(spec, deadline)
        else:
            answer_roll(spec, deadline)
        jax.distributed.initialize(
            spec.coordinator, spec.processes, spec.process, initialization_timeout=max(int(spec.timeout_s), 10),
            heartbeat_timeout_seconds=max(int(spec.heartbeat_s), 1),
            coordinator_bind_address=bound,  # else it listens on all of the host's addresses
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
    result = int(on_first(f) or 0)  # the processes' arrays must be of one dtype
    return result if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.asarray(result)))


def equals_first(text: str) -> bool:
    """Whether this process's text is that of process 0."""
    if jax.process_count() == 1:
        return True
    mine = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    return bool((np.asarray(multihost_utils.broadcast_one_to_all(mine)) == mine).all())


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
