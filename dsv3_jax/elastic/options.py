"""`--workers` and `--devices`. Importing this loads no JAX: bad input is refused within a second."""

import re

from dsv3_jax.cluster.limits import MOST_PROCESSES
from dsv3_jax.errors import UserError

MOST_DEVICES = 2**10  # of a worker


def parse_workers(workers: str | None) -> tuple[int, int]:
    """(MIN, MAX) of MIN:MAX, or of one number for both. Raises `UserError` for anything else."""
    match = re.fullmatch(r"(\d{1,18})(?::(\d{1,18}))?", workers or "")
    if match is None:
        raise UserError(f"--workers {(workers or '(missing)')[:40]}: use MIN:MAX, e.g. --workers 2:4")
    least, most = int(match[1]), int(match[2] or match[1])
    if not 1 <= least <= most <= MOST_PROCESSES:
        raise UserError(f"--workers {workers}: MIN must be 1 or more, MAX not less, and at most {MOST_PROCESSES:,}")
    return least, most


def check_devices(devices: int | None) -> int:
    """The number of devices of --devices. Raises `UserError` if it is missing or none that a worker can have."""
    if devices is None or not 1 <= devices <= MOST_DEVICES:
        given = "(missing)" if devices is None else devices
        raise UserError(f"--devices {given}: give the number of devices of each worker, 1 to {MOST_DEVICES:,}")
    return devices
