"""What a training step asks of an optimizer, and the parts that optimizers share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jaxtyping import Float

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


def _cast_floats(tree: Any, cast: Callable[[int, jax.Array], jax.Array]) -> Any:
    """The tree with its n-th array as cast(n, array), where that is of floating point."""
    arrays, structure = jax.tree.flatten(tree)
    return structure.unflatten([cast(n, a) if jnp.issubdtype(a.dtype, jnp.floating) else a for n, a in enumerate(arrays)])


def _random_bits(shape: tuple[int, ...], step: jax.Array, stream: int) -> jax.Array:
    """u32 numbers that depend on an entry's place in the whole array, the step and the stream alone: on no mesh, no process."""
    place = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        place = place * np.uint32(size) + lax.broadcasted_iota(jnp.uint32, shape, axis)
    seed = step.astype(jnp.uint32) * np.uint32(0x85EBCA77) + np.uint32(stream * 0xC2B2AE3D % 2**32)
    bits = place * np.uint32(0x9E3779B1) + seed
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # MurmurHash3's last steps
        bits = (bits ^ (bits >> shift)) * np.uint32(factor)
    return bits ^ (bits >> 16)


def round_at_random(x: Float[jax.Array, "*X"], step: jax.Array, stream: int) -> jax.Array:
    """bfloat16 x, which is float32, rounded up or down so that it is right on average; the same at each step on any mesh."""
    bits = lax.bitcast_convert_type(x, jnp.uint32) + (_random_bits(x.shape, step, stream) >> 16)
    rounded = lax.bitcast_convert_type(bits & np.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


# A step moves an average by (1 - decay) of its distance to what is new. bfloat16's numbers lie 2^-7 of themselves apart at
# most: an average that moves by less than half of that would stay where it is for ever, and one that moves by few of them is
# pulled off.
_COARSE = 4 * 2.0**-7


def store_moments_as(
    inner: optax.GradientTransformation, dtype: jnp.dtype | str, decays: tuple[float, ...]
) -> optax.GradientTransformation:
    """`inner` computing in float32 with its floating-point state kept in `dtype` between steps.

    `decays` are those of the averages in its state. Where one is so slow that rounding to the nearest bfloat16 would take away
    part of each step's change, or all of it, moments are rounded at random. `inner` then counts its steps, as Optax's do.
    """
    at_random = dtype == "bfloat16" and 1 - max(decays) < _COARSE

    def init(params):
        return _cast_floats(inner.init(params), lambda _, a: a.astype(dtype))

    def update(updates, state, params=None):
        updates, state = inner.update(updates, _cast_floats(state, lambda _, a: a.astype(jnp.float32)), params)
        if not at_random:
            return updates, _cast_floats(state, lambda _, a: a.astype(dtype))
        step = optax.tree.get(state, "count")
        return updates, _cast_floats(state, lambda n, a: round_at_random(a, step, n))

    return optax.GradientTransformation(init, update)


def decays(params: nnx.State) -> nnx.State:
    """True where a parameter takes part in weight decay."""
    return jax.tree.map(lambda p: kind_of(p).decays, params, is_leaf=lambda x: isinstance(x, nnx.Variable))
