"""`dsv3 train --engine` and `--workers`: from the command line's options to a supervised run."""

import contextlib
import os

from dsv3_jax.cluster.processes import cluster_spec, seconds_from
from dsv3_jax.config import Config
from dsv3_jax.cost.feasible import feasible_worker_counts, largest_feasible_count
from dsv3_jax.elastic.hosts import Engine, LocalEngine
from dsv3_jax.elastic.options import check_devices, parse_workers
from dsv3_jax.elastic.supervisor import Job, Supervisor
from dsv3_jax.errors import UserError
from dsv3_jax.runs.compatible import check_compatible
from dsv3_jax.runs.directory import SUPERVISOR_LOCK, run_directory

_HEARTBEAT_S = 15.0
_LOCK_PATIENCE_S = 60.0  # with workers of a supervisor that was killed
_JOIN_S = 60.0  # hosts have just answered, so that their workers join within seconds unless one is lost


def job_for(config: Config, args: list[str], workers: str | None, devices: int | None, rehearse: bool = False) -> Job:
    """What a supervisor is to run: the `dsv3` command `args` on MIN:MAX `workers` with `devices` each.

    Raises `UserError` where nothing could ever run: bad numbers, or no feasible mesh.
    """
    least, most = parse_workers(workers)
    devices = check_devices(devices)
    feasible = feasible_worker_counts(config, devices, range(1, most + 1))
    if not any(count >= least for count in feasible):
        raise UserError(
            f"--workers {workers}: no mesh over {least} to {most} workers of {devices} devices divides the model and "
            f"data.batch_size={config.data.batch_size}; numbers that do: {', '.join(map(str, feasible)) or 'none'}"
        )
    run = run_directory(config)
    check_compatible(run, config)
    heartbeat, join = seconds_from("DSV3_HEARTBEAT_S", _HEARTBEAT_S), seconds_from("DSV3_JOIN_TIMEOUT_S", _JOIN_S)
    return Job(config, [*args, "--workers", f"{least}:{most}"], run, least, most, devices, heartbeat, join, rehearse)


def leave_spares(config: Config, devices: int) -> None:
    """End this process, with exit code 0, if the run cannot use it; else leave the number of those it can in the environment.

    SLURM and Kubernetes start a worker on every node that is left; a run uses the largest number of them, with `devices` each,
    that has a feasible mesh. Raises `UserError` if no number has.
    """
    spec, devices = cluster_spec(os.environ), check_devices(devices)
    if spec is None:
        return
    count = largest_feasible_count(config, devices, spec.processes)
    if count == 0:
        raise UserError(f"no mesh over {spec.processes} or fewer workers of {devices} devices divides the model and the batch")
    if spec.process >= count:
        print(f"process {spec.process} is spare: the largest feasible number of workers is {count} of {spec.processes}")
        raise SystemExit(0)
    os.environ |= {
        "DSV3_COORDINATOR": spec.coordinator, "DSV3_PROCESSES": str(count), "DSV3_PROCESS_ID": str(spec.process),
    }  # fmt: skip


def supervise(
    config: Config, args: list[str], engine: str, workers: str | None, devices: int | None, rehearse: bool = False
) -> int:
    """Run the `dsv3` command `args` on an engine's hosts until it is done.

    Args:
        config: What `args` train.
        args: A verb of `dsv3` and its arguments.
        engine: local or ray.
        workers: MIN:MAX, or one number.
        devices: Devices per worker.
        rehearse: First compile for every smaller feasible number of workers.

    Returns:
        The exit code. Raises `UserError` for bad input.
    """
    job = job_for(config, args, workers, devices, rehearse)
    with contextlib.ExitStack() as until_end:
        until_end.enter_context(job.run.claimed(lock_name=SUPERVISOR_LOCK))
        with job.run.claimed(_LOCK_PATIENCE_S):  # nobody trains it without a supervisor, and no worker of the last one is left
            pass
        hosts = _engine(engine, job)
        until_end.callback(hosts.close)
        return Supervisor(job, hosts).run()


def _engine(name: str, job: Job) -> Engine:
    if name == "local":
        return LocalEngine(job.most, job.devices)
    try:
        from dsv3_jax.elastic.ray_engine import RayEngine
    except ModuleNotFoundError:
        raise UserError("--engine ray needs the extra `ray`: pip install dsv3-jax[ray]") from None
    return RayEngine(job.most, job.devices)
