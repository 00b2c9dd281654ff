"""`dsv3 plan --search`: every mesh, remat policy, number of microbatches and precision, ranked by arithmetic."""

from collections.abc import Iterator
from dataclasses import replace

from dsv3_jax.checks import divisors
from dsv3_jax.config import Config, PrecisionConfig, RematConfig
from dsv3_jax.cost.efficiency import Efficiency
from dsv3_jax.cost.estimate import Candidate, Estimator
from dsv3_jax.cost.topologies import GIB, Topology
from dsv3_jax.errors import UserError
from dsv3_jax.parallel.mesh import meshes
from dsv3_jax.parallel.rules import check


def candidates(config: Config, topology: Topology, recipes: tuple[str, ...]) -> Iterator[tuple[Config, dict[str, int]]]:
    """Every mesh over all devices that divides model and batch, with each remat policy, number of microbatches and recipe.

    Yields the configuration and the sizes of the mesh's axes.
    """
    for sizes in meshes(topology.size):
        rows = config.data.batch_size // (sizes["data"] * sizes["fsdp"] * sizes["expert"]) or 1
        for micro in (n for n in divisors(rows) if n <= 64):
            if sizes["pipe"] > 1 and micro < sizes["pipe"]:
                continue
            for policy in ("full", "selective"):
                for recipe in recipes:
                    try:
                        tried = replace(
                            config,
                            parallel=replace(config.parallel, **sizes),
                            train=replace(config.train, grad_accum_steps=micro),
                            remat=RematConfig(policy),
                            precision=PrecisionConfig(recipe),  # type: ignore[arg-type]
                        )
                        check(tried, sizes)
                    except UserError:
                        continue
                    yield tried, sizes


def search(config: Config, topology: Topology, efficiency: Efficiency, recipes: tuple[str, ...]) -> list[Candidate]:
    """All candidates whose estimated memory fits, the fastest first. Raises `UserError` if none does."""
    estimator, room = Estimator(topology, efficiency), topology.room
    found = [estimator.estimate(c, sizes) for c, sizes in candidates(config, topology, recipes)]
    if not found:
        raise UserError(
            f"data.batch_size={config.data.batch_size}: no mesh over {topology}'s {topology.size} devices divides it and "
            f"the model"
        )
    fitting = [c for c in found if c.memory <= room]
    if not fitting:
        least = min(found, key=lambda c: c.memory)
        raise UserError(
            f"topology={topology}: nothing fits; the least is {least.memory / GIB:.0f} of {room / GIB:.0f} GiB a device "
            f"({least.label})"
        )
    return sorted(fitting, key=lambda c: c.seconds)


def explain(winner: Candidate, other: Candidate) -> str:
    """One line that says where the winner's time is less."""
    parts = {"work": (winner.work, other.work)}
    parts |= {what: (seconds, other.communication[what]) for what, seconds in winner.communication.items()}
    changed = sorted(parts.items(), key=lambda item: -abs(item[1][1] - item[1][0]))
    differences = [f"{what} {a:.2f} instead of {b:.2f} s" for what, (a, b) in changed[:3] if abs(a - b) > 0.005]
    if abs(winner.occupancy - other.occupancy) > 0.005:
        differences.append(f"pipeline occupancy {winner.occupancy:.0%} instead of {other.occupancy:.0%}")
    return "; ".join(differences) or "no difference in the estimates"
