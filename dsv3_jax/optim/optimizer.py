"""What a training step asks of an optimizer, and the parts that optimizers share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dsv3_jax.config import OptimConfig
from dsv3_jax.model.parameters import kind_of


def no_second_moment(opt_state: optax.OptState) -> None:
    return None


@dataclass(frozen=True)
class Optimizer:
    """How parameters follow from gradients. How to add one: registry.py.

    `init` and `update` are those of an Optax transformation whose updates are added to the parameters. It does not clip: the
    step does, because it reports the norm. Arrays of the state that are `nnx.Param`s, as Optax makes them from parameters that
    are, are sharded like these; bytes of the state follow from `init` (see cost/memory.py).

    `second_moment` finds in a state, in the tree of the parameters, what sets the units in which gradients are rounded when
    they cross `data` in few bits (see `exchange.mean.second_moment_units`); None if it keeps none.
    """

    init: Callable[[nnx.State], optax.OptState]  # from parameters, which may be abstract
    update: Callable[..., tuple[Any, optax.OptState]]  # (gradients, state, parameters) -> (updates, state)
    second_moment: Callable[[optax.OptState], nnx.State | None] = no_second_moment


def learning_rate(config: OptimConfig) -> optax.Schedule:
    """Linear warm-up to `lr`, constant until `decay_start`, cosine to `lr_final` over `decay_steps`, then constant."""
    warmup = max(config.warmup_steps, 1)
    # step 0 already learns: warm-up reaches lr at its last step rather than one after
    return optax.join_schedules(
        [
            optax.linear_schedule(config.lr / warmup, config.lr, warmup - 1)
            if warmup > 1
            else optax.constant_schedule(config.lr),
            optax.constant_schedule(config.lr),
            optax.cosine_decay_schedule(config.lr, config.decay_steps, alpha=config.lr_final / config.lr),
        ],
        [config.warmup_steps, config.decay_start],
    )


def store_moments_as(inner: optax.GradientTransformation, dtype: jnp.dtype | str) -> optax.GradientTransformation:
    """`inner` computing in float32 with its floating-point state kept in `dtype` between steps."""

    def cast(tree: Any, dtype: jnp.dtype | str) -> Any:
        return jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)

    def init(params):
        return cast(inner.init(params), dtype)

    def update(updates, state, params=None):
        updates, state = inner.update(updates, cast(state, "float32"), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)


def decays(params: nnx.State) -> nnx.State:
    """True where a parameter takes part in weight decay."""
    return jax.tree.map(lambda p: kind_of(p).decays, params, is_leaf=lambda x: isinstance(x, nnx.Variable))
