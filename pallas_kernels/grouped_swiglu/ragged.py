"""Grouped SwiGLU on `jax.lax.ragged_dot`: for platforms that have a grouped kernel behind it."""

import jax
import jax.numpy as jnp


def grouped_swiglu(x_TD, w_gate_up_ED2M, w_down_EMD, expert_TK, weight_TK):
    """See `api.grouped_swiglu`. P = T*K slots, sorted by expert; those without one come last, beyond all groups."""
    T, K = expert_TK.shape
    E, D, _, M = w_gate_up_ED2M.shape
    order_P = jnp.argsort(expert_TK.reshape(-1), stable=True)
    count_E = jnp.bincount(expert_TK.reshape(-1), length=E)
    counts_P = (jnp.arange(T * K) < count_E.sum())[:, None]  # what ragged_dot does with rows beyond its groups is its own
    x_PD = jnp.where(counts_P, x_TD[order_P // K], 0)
    gate_up_PX = jax.lax.ragged_dot(x_PD, w_gate_up_ED2M.reshape(E, D, 2 * M), count_E)
    gate_PM, up_PM = jnp.split(gate_up_PX, 2, axis=-1)
    weight_P1 = weight_TK.reshape(-1)[order_P][:, None]
    h_PM = jnp.where(counts_P, jax.nn.silu(gate_PM) * up_PM * weight_P1, 0).astype(x_TD.dtype)
    y_PD = jnp.where(counts_P, jax.lax.ragged_dot(h_PM, w_down_EMD, count_E), 0)
    if K == 1:
        return jnp.zeros_like(y_PD).at[order_P].set(y_PD)
    return jnp.zeros_like(x_TD).at[order_P // K].add(y_PD)
