"""AdamW, the optimizer of the report (arXiv 2412.19437, section 4.2), put together from Optax's parts."""

import optax

from dsv3_jax.config import OptimConfig
from dsv3_jax.optim.optimizer import Optimizer, decays, learning_rate, store_moments_as


def adamw(config: OptimConfig, moment_dtype: str = "float32") -> Optimizer:
    """AdamW with the learning rate's schedule, decay on matrices only.

    Args:
        moment_dtype: float32 or bfloat16, what the moments are stored in: see `store_moments_as` for how they are rounded.
    """
    adam = optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps)
    if moment_dtype == "bfloat16":
        adam = store_moments_as(adam, moment_dtype, (config.beta1, config.beta2))
    chain = optax.chain(
        adam,
        optax.add_decayed_weights(config.weight_decay, mask=decays),
        optax.scale_by_learning_rate(learning_rate(config)),
    )
    return Optimizer(chain.init, chain.update, lambda opt_state: optax.tree.get(opt_state, "nu"))
