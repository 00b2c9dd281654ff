"""Compiling a step for a mesh that is not here: in a process of its own, with limits, and cached by content."""

import contextlib
import gzip
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

from dsv3_jax.config import Config, config_from_dict, config_to_dict
from dsv3_jax.cost.links import Location
from dsv3_jax.cost.topologies import ENVIRONMENT, Topology, parse_topology
from dsv3_jax.data.cache import cache_root, cached
from dsv3_jax.errors import UserError
from dsv3_jax.plan.hlo import Program, parse

_PACKAGES = Path(__file__).parents[2]
_POLL_S = 0.25
TRAINING, SERVING = "dsv3_jax.plan.worker", "dsv3_jax.plan.serving_worker"


@dataclass(frozen=True)
class Limits:
    """Limits of the compiling process; it is stopped beyond them."""

    memory_gb: float = 16.0
    seconds: float = 3600.0


@dataclass(frozen=True)
class Compiled:
    """A compiled step, and what is known about it."""

    topology: Topology
    mesh: dict[str, int]  # axis sizes
    locations: list[Location]  # of the devices, in the order of the program's partitions
    memory: dict[str, int]  # memory_analysis(), in bytes per device
    state: dict[str, int]  # bytes per device of each part of the state
    seconds: dict[str, float]  # of tracing and compiling
    versions: dict[str, str]
    program: Program
    precision: str  # precision.recipe, with `auto` resolved
    exchange: str  # how parallel.compress was resolved, and why; empty if compression was not asked for


def compilers() -> str:
    """The path of a Python that has the TPU and GPU compilers: DSV3_PLAN_PYTHON, this one, or the checkout's .venv-aot.

    Raises `UserError` if there is none.
    """
    if named := os.environ.get("DSV3_PLAN_PYTHON"):
        if not shutil.which(named):
            raise UserError(f"DSV3_PLAN_PYTHON={named} is not an executable")
        return named
    if importlib.util.find_spec("libtpu"):
        return sys.executable
    beside = _PACKAGES / ".venv-aot" / "bin" / "python"
    if beside.is_file():
        return str(beside)
    raise UserError(
        "plan needs the compilers for TPUs and NVIDIA GPUs: scripts/tools/setup_aot.sh makes .venv-aot with them, or name a "
        "Python that has libtpu and jax-cuda13-plugin as DSV3_PLAN_PYTHON"
    )


def _source_digest() -> str:
    """SHA-256 of all sources that a compiled program depends on."""
    digest = hashlib.sha256()
    for package in ("dsv3_jax", "pallas_kernels"):
        for path in sorted((_PACKAGES / package).rglob("*.py")):
            if "plan" not in path.parts or path.name.endswith("worker.py"):
                digest.update(path.read_bytes())
    return digest.hexdigest()


def _key(worker: str, request: dict[str, Any]) -> str:
    """The cache's key: a hash of all that a compiled program depends on, without the configuration's other sections."""
    tree = {k: v for k, v in request["config"].items() if k not in ("name", "checkpoint")}
    topology = str(parse_topology(request["topology"]))
    asked = json.dumps(
        [worker, request | {"config": tree, "topology": topology}, compilers(), _source_digest()], sort_keys=True
    )
    return hashlib.sha256(asked.encode()).hexdigest()[:24]


def compile_step(
    config: Config,
    topology: str,
    options: dict[str, Any] | None = None,
    limits: Limits = Limits(),
    say: Callable[[str, float, float], None] = lambda phase, seconds, gb: None,
) -> Compiled:
    """The training step of `config`, compiled for `topology`, or read from the cache.

    Args:
        options: XLA's compiler options by name.
        say: Called with the phase, the seconds and the compiler's memory in GB while it works.

    Raises `UserError` for bad input, and with the compiler's message if it fails or passes a limit.
    """
    return compile_by(TRAINING, {"config": config_to_dict(config), "topology": topology, "options": options or {}}, limits, say)


def compile_by(worker: str, request: dict[str, Any], limits: Limits, say: Callable[[str, float, float], None]) -> Compiled:
    """What a worker's module makes of a request, which names a config, a topology and options; see `compile_step`."""
    config = config_from_dict(request["config"])

    def build(out: Path) -> None:
        _run(worker, request | {"out": str(out)}, limits, say)

    root, key = cache_root(config.data) / "plans", _key(worker, request)
    directory = cached(root, key, build)
    try:
        return read(directory)
    except Exception:  # damaged on its disk, which shows in many ways: it is made again
        shutil.rmtree(directory, ignore_errors=True)
        return read(cached(root, key, build))


def read(directory: Path) -> Compiled:
    """Read what plan/worker.py has written."""
    facts = json.loads((directory / "facts.json").read_text())
    with gzip.open(directory / "program.txt.gz", "rt") as file:
        program = parse(file.read())
    locations = [(slice_, host, tuple(coordinates)) for slice_, host, coordinates in facts.pop("locations")]
    return Compiled(topology=parse_topology(facts.pop("topology")), locations=locations, program=program, **facts)


def _memory_gb(pid: int) -> float:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9
    return 0.0


def _run(worker: str, request: dict[str, Any], limits: Limits, say: Callable[[str, float, float], None]) -> None:
    command = [compilers(), "-m", worker]
    path = os.pathsep.join([str(_PACKAGES), *filter(None, [os.environ.get("PYTHONPATH")])])
    log = Path(request["out"]) / "log.txt"
    with log.open("w") as errors:
        child = subprocess.Popen(
            command, env=os.environ | ENVIRONMENT | {"PYTHONPATH": path}, text=True, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
        )  # fmt: skip
    assert child.stdin
    assert child.stdout
    child.stdin.write(json.dumps(request))
    child.stdin.close()
    phases = ["starting"]
    Thread(target=lambda out=child.stdout: phases.extend(line.strip() for line in out), daemon=True).start()
    began, stopped = time.monotonic(), ""
    try:
        while child.poll() is None:
            seconds, gb = time.monotonic() - began, _memory_gb(child.pid)
            say(phases[-1], seconds, gb)
            if gb > limits.memory_gb:
                stopped = f"the compiler took more than {limits.memory_gb:g} GB of memory while {phases[-1]} (--memory-gb)"
            elif seconds > limits.seconds:
                stopped = f"the compiler took longer than {limits.seconds:g} s (--timeout-s)"
            if stopped:
                break
            time.sleep(_POLL_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    if (Path(request["out"]) / "facts.json").is_file():
        return
    error = Path(request["out"]) / "error.txt"
    if error.is_file():
        raise UserError(error.read_text())
    raise UserError(f"topology={request['topology']}: {stopped or _failure(log.read_text(), child.returncode)}")


def _failure(log: str, code: int) -> str:
    """Why the compiler ended, from its log and exit code."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if "RESOURCE_EXHAUSTED" in line or "Error" in line] or lines
    how = f"was ended by signal {-code}" if code < 0 else "failed"
    return f"the compiler {how}: {errors[-1][:600] if errors else 'it wrote nothing'}"
