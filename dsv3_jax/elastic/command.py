"""`dsv3 train --engine`: a supervised run, from what the command line says."""

import os
import re

from dsv3_jax.cluster.processes import place_from, seconds_from
from dsv3_jax.config import Config
from dsv3_jax.cost.feasible import feasible_worker_counts, largest_feasible_count
from dsv3_jax.elastic.hosts import Engine, LocalEngine
from dsv3_jax.elastic.supervisor import Job, Supervisor
from dsv3_jax.errors import UserError
from dsv3_jax.runs.directory import run_directory

_HEARTBEAT_S = 15.0
_JOIN_S = 60.0  # hosts have answered just before: their workers come within seconds, where all is well


def parse_workers(workers: str | None) -> tuple[int, int]:
    """MIN:MAX, or one number for both."""
    match = re.fullmatch(r"(\d+)(?::(\d+))?", workers or "")
    if match is None:
        raise UserError(f"--workers {workers or '(missing)'}: use MIN:MAX, e.g. --workers 2:4")
    least, most = int(match[1]), int(match[2] or match[1])
    if not 1 <= least <= most:
        raise UserError(f"--workers {workers}: MIN must be 1 or more, and MAX not less")
    return least, most


def job_for(config: Config, args: list[str], workers: str | None, devices: int | None, rehearse: bool = False) -> Job:
    """Raises `UserError` where nothing could ever run: no devices, or no legal mesh."""
    least, most = parse_workers(workers)
    if devices is None or devices < 1:
        raise UserError(f"--devices {devices or '(missing)'}: say how many devices each worker has, 1 or more")
    legal = feasible_worker_counts(config, devices, range(1, most + 1))
    if not any(count >= least for count in legal):
        raise UserError(
            f"--workers {workers}: no mesh over {least} to {most} workers of {devices} devices divides the model and "
            f"data.batch_size={config.data.batch_size}; numbers that do: {', '.join(map(str, legal)) or 'none'}"
        )
    run = run_directory(config)
    run.check_belongs_to(config)
    heartbeat, join = seconds_from("DSV3_HEARTBEAT_S", _HEARTBEAT_S), seconds_from("DSV3_JOIN_TIMEOUT_S", _JOIN_S)
    return Job(config, [*args, "--workers", f"{least}:{most}"], run, least, most, devices, heartbeat, join, rehearse)


def leave_spares(config: Config, devices: int) -> None:
    """Of the processes that the environment describes, those beyond the largest legal number end well; the rest are the run.

    Where the environment is SLURM's or Kubernetes', which start a worker on whatever is left. Raises `UserError` if no number
    is legal.
    """
    place = place_from(os.environ)
    if place is None:
        return
    count = largest_feasible_count(config, devices, place.processes)
    if count == 0:
        raise UserError(f"no mesh over {place.processes} or fewer workers of {devices} devices divides the model and the batch")
    if place.process >= count:
        print(f"process {place.process} is spare: the largest legal number of workers is {count} of {place.processes}")
        raise SystemExit(0)
    os.environ |= {
        "DSV3_COORDINATOR": place.coordinator, "DSV3_PROCESSES": str(count), "DSV3_PROCESS_ID": str(place.process),
    }  # fmt: skip


def supervise(
    config: Config, args: list[str], engine: str, workers: str | None, devices: int | None, rehearse: bool = False
) -> int:
    """Run `dsv3 ARGS` on an engine's hosts until it is done. Returns the exit code; raises `UserError` for bad input."""
    job = job_for(config, args, workers, devices, rehearse)
    hosts = _engine(engine, job)
    try:
        return Supervisor(job, hosts, lambda text: print(text, flush=True)).run()
    finally:
        hosts.close()


def _engine(name: str, job: Job) -> Engine:
    if name == "local":
        return LocalEngine(job.most, job.devices)
    try:
        from dsv3_jax.elastic.ray_engine import RayEngine
    except ModuleNotFoundError:
        raise UserError("--engine ray needs the extra `ray`: pip install dsv3-jax[ray]") from None
    return RayEngine(job.most, job.devices)
