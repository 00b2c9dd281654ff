"""The optimizers that `optim.name` can name.

To add one: a function like `adamw` in a file of its own, its name below, and the same name in `OptimConfig.name`.
"""

from collections.abc import Callable

from dsv3_jax.config import Config, OptimConfig
from dsv3_jax.optim.adamw import adamw
from dsv3_jax.optim.optimizer import Optimizer
from dsv3_jax.precision.recipes import recipe_of

# by name: (configuration, what the moments are stored in) -> the optimizer
OPTIMIZERS: dict[str, Callable[[OptimConfig, str], Optimizer]] = {"adamw": adamw}


def optimizer_of(config: Config) -> Optimizer:
    """The optimizer that a configuration names, its moments stored as `optim.moment_dtype` or the recipe says."""
    stored = config.optim.moment_dtype
    return OPTIMIZERS[config.optim.name](config.optim, recipe_of(config.precision).moments if stored == "recipe" else stored)
