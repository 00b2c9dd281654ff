"""The optimiser of the report (arXiv 2412.19437, section 4.2), put together from Optax's parts."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dsv3_jax.config import OptimConfig


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


def store_moments_as(inner: optax.GradientTransformation, dtype: jnp.dtype) -> optax.GradientTransformation:
    """`inner` computing in float32 with its floating-point state kept in `dtype` between steps."""

    def cast(tree, dtype):
        return jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)

    def init(params):
        return cast(inner.init(params), dtype)

    def update(updates, state, params=None):
        updates, state = inner.update(updates, cast(state, jnp.dtype("float32")), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)


def is_matrix(params: nnx.State) -> nnx.State:
    """True where a parameter is a matrix by its declared axes (a stack of norm scales is not one): what decays."""
    return jax.tree.map(
        lambda p: len(p.get_metadata("logical_axes")) >= 2, params, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )


def adamw(config: OptimConfig, moment_dtype: str = "float32") -> optax.GradientTransformation:
    """AdamW without clipping (the step clips, because it reports the norm); decay on matrices only.

    `moment_dtype`, float32 or bfloat16, is what the moments are stored in.
    """
    adam = optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps)
    if moment_dtype == "bfloat16":
        adam = store_moments_as(adam, jnp.dtype("bfloat16"))
    return optax.chain(
        adam,
        optax.add_decayed_weights(config.weight_decay, mask=is_matrix),
        optax.scale_by_learning_rate(learning_rate(config)),
    )


def second_moment(opt_state: optax.OptState) -> nnx.State:
    """Of the state of `adamw`, in the tree of the parameters."""
    return optax.tree.get(opt_state, "nu")
