"""The optimizers that `optim.name` can name.

To add one: a function like `adamw` in a file of its own, its name below, and the same name in `OptimConfig.name`.
"""

from collections.abc import Callable

from dsv3_jax.config import Config, OptimConfig, PrecisionConfig
from dsv3_jax.optim.adamw import adamw
from dsv3_jax.optim.optimizer import Optimizer
from dsv3_jax.precision.recipes import recipe_of

# by name: (configuration, what the moments are stored in) -> the optimizer
OPTIMIZERS: dict[str, Callable[[OptimConfig, str], Optimizer]] = {"adamw": adamw}


def make_optimizer(optim: OptimConfig, precision: PrecisionConfig) -> Optimizer:
    """The optimizer of `optim.name`, its moments stored as `optim.moment_dtype` or the recipe says."""
    stored = recipe_of(precision).moments if optim.moment_dtype == "recipe" else optim.moment_dtype
    return OPTIMIZERS[optim.name](optim, stored)


def optimizer_of(config: Config) -> Optimizer:
    """The optimizer of a configuration."""
    return make_optimizer(config.optim, config.precision)
