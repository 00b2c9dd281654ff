"""Grouped SwiGLU on `jax.lax.ragged_dot`: for platforms that have a grouped kernel behind it."""

import jax
import jax.numpy as jnp


def grouped_swiglu(x_TD, w_gate_up_ED2M, w_down_EMD, expert_TK, weight_TK):
    """See `api.grouped_swiglu`. P = T*K slots, sorted by expert."""
    T, K = expert_TK.shape
    E, D, _, M = w_gate_up_ED2M.shape
    order_P = jnp.argsort(expert_TK.reshape(-1), stable=True)
    count_E = jnp.bincount(expert_TK.reshape(-1), length=E)
    x_PD = x_TD[order_P // K]
    gate_up_PX = jax.lax.ragged_dot(x_PD, w_gate_up_ED2M.reshape(E, D, 2 * M), count_E)
    gate_PM, up_PM = jnp.split(gate_up_PX, 2, axis=-1)
    y_PD = jax.lax.ragged_dot(jax.nn.silu(gate_PM) * up_PM, w_down_EMD, count_E)
    y_TKD = jnp.zeros_like(y_PD).at[order_P].set(y_PD).reshape(T, K, -1)
    return jnp.einsum("tkd,tk->td", y_TKD, weight_TK.astype(y_TKD.dtype))
