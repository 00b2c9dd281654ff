"""Goodput of a long run under published failure rates: this package's recovery against restarting from a checkpoint.

    python scripts/studies/simulate_failures.py                        # 512, 2,048 and 16,384 devices, 54 days, 20 runs each
    python scripts/studies/simulate_failures.py --devices 4096 --replace-min 30

Failures come as a Poisson process at the rate of Llama 3's pre-training: 419 unexpected interruptions in 54 days on 16,384 GPUs
(arXiv 2407.21783, section 3.3.4). Each takes away a host, which is replaced after --replace-min. Both designs checkpoint every
10 minutes. What differs:

- `restart`: the whole run waits for the replacement, then starts from nothing: containers, imports, tracing, compiling.
- `elastic`: the run goes on at once on the largest feasible number of hosts (cost/feasible.py, the released model and the batch
  of its report, at most 40 GiB of state a device), from interpreters and programs that are kept; when the replacement is there
  it saves, and grows back.

Seconds of software are those measured on CPU workers here (docs/elastic.md); reading the state, at a rate a host that is an
assumption, is the same in both. Goodput is the work that is kept, over that of all devices in all of the time.
"""

import argparse
import json
import random
import statistics
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dsv3_jax.config import load_config
from dsv3_jax.cost.feasible import largest_feasible_count

PRESET = Path(__file__).parents[2] / "configs" / "v3_671b.yaml"
DAY = 86400.0
FAILURES_PER_DEVICE_SECOND = 419 / (54 * DAY * 16384)
HOST = 8  # devices
INTERVAL = 600.0  # checkpoint.every_minutes
STATE_BYTES = 671e9 * (4 + 2 + 2) + 14e9 * 8  # float32 weights, two bfloat16 moments; the MTP module's as well
STEP = 10.0  # seconds; a step in progress is lost


@dataclass(frozen=True)
class Design:
    """How a run recovers, and the seconds that failures and checkpoints cost."""

    detection: float
    restart: float  # until processes have joined
    compile: float
    stall: float  # of a checkpoint
    elastic: bool  # goes on without the host that failed


DESIGNS = {
    # JAX's default heartbeat; a container's start and imports; a compilation of the 671B step (README)
    "restart": Design(100.0, 120.0, 180.0, 0.1, False),
    # DSV3_HEARTBEAT_S for a host that is cut off; workers forked and programs read (docs/elastic.md)
    "elastic": Design(15.0, 5.0, 5.0, 0.1, True),
}


def simulate(
    design: Design, hosts: int, shrunk: int, seconds: float, replace: float, restore: float, rng: random.Random
) -> float:
    """Goodput of one run. `shrunk`: hosts it goes on with while one is missing; `restore`: seconds to read the state."""
    rate = FAILURES_PER_DEVICE_SECOND * hosts * HOST
    down = design.restart + design.compile + restore
    now, kept, missing_until = 0.0, 0.0, 0.0  # kept: seconds of work of all hosts
    failure = rng.expovariate(rate)
    while now < seconds:
        speed = shrunk / hosts if missing_until > now else 1.0
        end = min(failure, missing_until if missing_until > now else failure, seconds)
        span = end - now
        working = span * INTERVAL / (INTERVAL + design.stall)
        now = end
        if end == failure:
            kept += max(0.0, working - min(working, rng.uniform(0, INTERVAL) + rng.uniform(0, STEP))) * speed
            now += design.detection + down if design.elastic else design.detection + max(replace, 0.0) + down
            missing_until = end + replace if design.elastic else 0.0
            failure = now + rng.expovariate(rate)
        else:
            kept += working * speed
            if design.elastic and end == missing_until and end < seconds:  # saved, and again on all hosts
                now += down
                failure = max(failure, now)
    return kept / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[512, 2048, 16384])
    parser.add_argument("--days", type=float, default=54.0)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--replace-min", type=float, default=10.0, help="until a failed host is replaced")
    parser.add_argument("--read-gb-s", type=float, default=2.0, help="what a host reads from shared storage")
    options = parser.parse_args()
    config = load_config(PRESET, ["data.batch_size=15360", "train.grad_accum_steps=1", "parallel.max_state_gib=40"])
    table = Table(
        "devices", "failures", "goes on with", *DESIGNS, "lost time, restart / elastic", title=f"goodput, {options.days:g} days"
    )
    results = []
    for devices in options.devices:
        hosts = devices // HOST
        shrunk = largest_feasible_count(config, HOST, hosts - 1)
        restore = STATE_BYTES / hosts / (options.read_gb_s * 1e9)
        goodput = {
            name: statistics.mean(
                simulate(design, hosts, shrunk, options.days * DAY, options.replace_min * 60, restore, random.Random(seed))
                for seed in range(options.runs)
            )
            for name, design in DESIGNS.items()
        }
        failures = FAILURES_PER_DEVICE_SECOND * devices * options.days * DAY
        lost = (1 - goodput["restart"]) / (1 - goodput["elastic"])
        table.add_row(
            f"{devices:,}",
            f"{failures:.0f}",
            f"{shrunk} of {hosts} hosts",
            *(f"{g:.2%}" for g in goodput.values()),
            f"{lost:.1f}x",
        )
        results.append({"devices": devices, "failures": failures, "hosts": hosts, "shrunk": shrunk} | goodput)
    Console(highlight=False, width=130).print(table)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
