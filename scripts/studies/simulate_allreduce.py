"""Time that each step from one flat ring to a two-level exchange of 2 bits saves in a gradient all-reduce (alpha-beta model).

    python scripts/studies/simulate_allreduce.py                       # 125 hosts of 8 H100, as many gradients as take 50 ms
    python scripts/studies/simulate_allreduce.py --hosts 128 --gigabytes 4 --contention 1.5 --platform h800

A message takes alpha + bytes / beta; links and their sources are those of dsv3_jax/precision/hardware.yaml (one network adapter
per GPU, NVLink inside a host). With S bytes of bf16 gradients on each of N = hosts x 8 GPUs:

- flat ring: one ring over all; every step waits for its slowest link, a network adapter: 2 (N-1) (alpha + S / N / beta);
- a ring for each adapter (as NCCL does): 8 such rings, each of an eighth of the bytes, entering and leaving hosts elsewhere;
- two levels: reduce-scatter inside the host, an all-reduce of each eighth between hosts by its own adapter (a ring, or NCCL's
  double binary tree, whichever is shorter), all-gather inside;
- two levels, compressed: between hosts all-to-all of codes and a scale for each --block, then all-gather of codes; quantising
  and adding up read and write device memory.

An assumption: --contention multiplies the time of all-to-all exchanges on the network; NVLink's switch inside a host has none.
No overlap with the backward pass is counted. No hardware was timed for this.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from dsv3_jax.cost.all_reduce import Link, ring, tree
from dsv3_jax.precision.platforms import HARDWARE

HOST = 8  # GPUs


@dataclass(frozen=True)
class Cluster:
    hosts: int
    inside: Link
    between: Link
    memory: float  # bytes per second of a device's memory
    contention: float = 1.0

    @property
    def gpus(self) -> int:
        return self.hosts * HOST


def cluster_of(platform: str, hosts: int, contention: float) -> Cluster:
    facts = HARDWARE[platform]
    inside, between = (
        Link(facts["links"][name]["latency_us"] * 1e-6, facts["links"][name]["gb_s"] * 1e9) for name in ("nvlink", "network")
    )
    return Cluster(hosts, inside, between, facts["memory_tb_s"] * 1e12, contention)


def inside_host(size: float, cluster: Cluster) -> float:
    """Seconds of a reduce-scatter and an all-gather of `size` bytes inside a host."""
    return 2 * (HOST - 1) * (cluster.inside.alpha + size / HOST / cluster.inside.beta)


def wire_share(bits: int, block: int) -> float:
    """Bytes sent for a bf16 number, its code and its part of a float32 scale, over its own two bytes."""
    return (bits / 8 + 4 / block) / 2


def exchange(size: float, bits: int, block: int, cluster: Cluster) -> float:
    """Seconds, for `size` bytes of bf16, of an all-to-all of codes between hosts, their mean, an all-gather, and quantising."""
    hosts, link, share = cluster.hosts, cluster.between, wire_share(bits, block)
    one_way = (hosts - 1) * link.alpha + (hosts - 1) / hosts * size * share / link.beta
    # float32 gradients and errors in, errors and codes out; all hosts' codes in, codes of means out; those in, float32 out
    memory = 4 * 2 * size + 4 * share * size
    return one_way * (cluster.contention + 1) + memory / cluster.memory


def algorithms(bits: int, block: int) -> dict[str, Callable[[float, Cluster], float]]:
    """Functions of bytes and cluster that give seconds, by name; each adds one step to the one before."""
    return {
        "one flat ring": lambda size, c: ring(size, c.gpus, c.between),
        "a ring for each adapter": lambda size, c: ring(size / HOST, c.gpus, c.between),
        "two levels": lambda size, c: (
            inside_host(size, c) + min(f(size / HOST, c.hosts, c.between) for f in (ring, tree))
        ),
        f"two levels, {bits} bits": lambda size, c: inside_host(size, c) + exchange(size / HOST, bits, block, c),
    }  # fmt: skip


def bytes_for(seconds: float, f: Callable[[float, Cluster], float], cluster: Cluster) -> float:
    """Bytes of gradients that take an algorithm this many seconds; 0 if its messages alone take longer."""
    if seconds <= f(0.0, cluster):
        return 0.0
    least, most = 0.0, 1.0
    while f(most, cluster) < seconds:
        least, most = most, 2 * most
    for _ in range(60):
        middle = (least + most) / 2
        least, most = (middle, most) if f(middle, cluster) < seconds else (least, middle)
    return most


def steps(size: float, names: dict[str, Callable[[float, Cluster], float]], cluster: Cluster) -> Iterator[dict[str, Any]]:
    before = None
    for name, f in names.items():
        seconds = f(size, cluster)
        yield {
            "name": name,
            "ms": seconds * 1e3,
            "latency_ms": f(0.0, cluster) * 1e3,
            "saved_ms": (before or seconds) * 1e3 - seconds * 1e3,
        }
        before = seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=125)
    parser.add_argument("--platform", choices=("a100", "h100", "h800"), default="h100")
    parser.add_argument("--gigabytes", type=float, help="of bf16 gradients; if not given, as many as take each baseline --ms")
    parser.add_argument("--ms", type=float, default=50.0, help="time of each baseline, if --gigabytes is not given")
    parser.add_argument("--bits", type=int, choices=(1, 2, 4, 8), default=2)
    parser.add_argument("--block", type=int, default=256, help="numbers that share a scale")
    parser.add_argument("--contention", type=float, default=1.0, help="of all-to-all between hosts: 1 is a full fat tree")
    args = parser.parse_args()
    if args.hosts < 2:
        parser.error(f"--hosts {args.hosts}: use 2 or more")
    cluster, names = cluster_of(args.platform, args.hosts, args.contention), algorithms(args.bits, args.block)
    cases = {"as given": args.gigabytes * 1e9} if args.gigabytes else {
        f"{args.ms:g} ms by {name}": bytes_for(args.ms / 1e3, f, cluster) for name, f in list(names.items())[:3]
    }  # fmt: skip
    console, results = Console(highlight=False, width=120), {}
    for case, size in cases.items():
        if not size:
            console.print(f"{case}: messages alone take longer")
            continue
        results[case] = {"bytes": size, "steps": list(steps(size, names, cluster))}
        title = f"{case}: {size / 1e9:.2f} GB of bf16 gradients on each of {cluster.gpus} {args.platform} GPUs"
        table = Table("", "ms", "latency alone", "saved by this step", "times faster than the first", title=title)
        first = results[case]["steps"][0]["ms"]
        for row in results[case]["steps"]:
            table.add_row(
                row["name"],
                f"{row['ms']:.1f}",
                f"{row['latency_ms']:.1f}",
                f"{row['saved_ms']:.1f}",
                f"{first / row['ms']:.1f}",
            )
        console.print(table)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
