"""How much of a device's peaks programs are assumed to reach (docs/plan.md)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Efficiency:
    """Shares of the peaks that are reached."""

    matmul: float = 1.0
    memory: float = 1.0
    link: float = 1.0


# Not fitted to anything: what large products, streams of memory and rings of links reach.
ASSUMED = Efficiency(matmul=0.75, memory=0.9, link=0.85)
