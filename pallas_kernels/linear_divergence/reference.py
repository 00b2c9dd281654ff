"""Definition of the divergence of two heads: all logits at once."""

import jax
import jax.numpy as jnp

from pallas_kernels.products import dot


def linear_divergence(x_TD, w_DV, teacher_x_TC, teacher_w_CV, weight_T, temperature):
    """See `api.linear_divergence`. Holds 2 T*V logits: for tests only."""
    log_q_TV = jax.nn.log_softmax(dot(x_TD, w_DV, dtype=jnp.float32) / temperature)
    log_p_TV = jax.nn.log_softmax(dot(teacher_x_TC, teacher_w_CV, dtype=jnp.float32) / temperature)
    log_p_TV = jax.lax.stop_gradient(log_p_TV)
    kl_T = (jnp.exp(log_p_TV) * (log_p_TV - log_q_TV)).sum(-1)
    return temperature**2 * jnp.sum(weight_T * kl_T)
