"""Which meshes divide a batch and a model, by arithmetic alone: importing this loads no JAX, and bad input is refused fast."""

import math
from collections.abc import Iterator

from dsv3_jax.checks import divisors
from dsv3_jax.config import Config
from dsv3_jax.errors import UserError

_AXES = ("data", "pipe", "fsdp", "expert", "tensor")


def rows_of(config: Config) -> int:
    """Sequences of a microbatch, which `data`, `fsdp` and `expert` share."""
    return config.data.batch_size // config.train.grad_accum_steps


def meshes_that_divide(config: Config, devices: int) -> Iterator[dict[str, int]]:
    """The meshes over `devices` devices that divide rows, heads, experts and width, in the order of `parallel.mesh.meshes`.

    All other meshes fail `parallel.rules.check`, and of most numbers of devices this leaves none.
    """
    rows, heads, experts = rows_of(config), config.model.num_attention_heads, config.model.n_routed_experts
    if rows * heads % devices:
        return
    for data in divisors(math.gcd(devices, rows)):
        if config.model.hidden_size % (devices // data):
            continue
        for pipe in divisors(math.gcd(devices // data, heads)):
            for tensor in divisors(math.gcd(devices // data // pipe, heads // pipe)):
                left = devices // data // pipe // tensor
                if rows // data % left == 0:
                    for expert in divisors(math.gcd(left, experts)):
                        yield dict(zip(_AXES, (data, pipe, left // expert, expert, tensor), strict=True))


def no_mesh(config: Config, workers: range, devices: int) -> UserError:
    """The error for numbers of workers, with `devices` each, of which none has a mesh."""
    return UserError(
        f"--workers {workers[0]}:{workers[-1]}: no mesh over so many workers of {devices} devices divides the model and "
        f"data.batch_size={config.data.batch_size}"
    )


def check_divisible(config: Config, workers: range, devices: int) -> None:
    """Raise `UserError` if no mesh over any of `workers`, with `devices` each, divides rows, heads, experts and width."""
    if not any(next(meshes_that_divide(config, count * devices), None) for count in workers):
        raise no_mesh(config, workers, devices)
