"""Grouped SwiGLU for a handful of tokens that need most experts: every expert on every token, as two wide matmuls.

Reading the weights is all the cost then, and a wide matmul reads them once, in place. It wants the experts' first weights
side by side, a layout that training does not use: who decodes rearranges them once.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.products import dot


def dense_is_worthwhile(tokens: int, choices: int, experts: int) -> bool:
    """Whether there are few tokens, whose choices reach most experts."""
    return tokens <= 16 and tokens * choices >= experts


def dense_swiglu(
    x_TD: Float[Array, "T D"],
    w_gate_up_DE2M: Float[Array, "D E 2 M"],
    w_down_EMD: Float[Array, "E M D"],
    expert_TK: Int[Array, "T K"],
    weight_TK: Float[Array, "T K"],
) -> Float[Array, "T D"]:
    """The result of `grouped_swiglu`, from weights whose first axes are swapped."""
    D, E, _, M = w_gate_up_DE2M.shape
    T = x_TD.shape[0]
    gate_up_TX = dot(x_TD, w_gate_up_DE2M.reshape(D, -1), dtype=jnp.float32)
    gate_up_TE2M = gate_up_TX.reshape(T, E, 2, M)
    chosen_TKE = expert_TK[..., None] == jnp.arange(E)
    weight_TE = jnp.sum(jnp.where(chosen_TKE, weight_TK[..., None], 0), axis=1)
    h_TEM = jax.nn.silu(gate_up_TE2M[:, :, 0]) * gate_up_TE2M[:, :, 1] * weight_TE[..., None]
    h_TX = h_TEM.reshape(T, E * M).astype(x_TD.dtype)
    return dot(h_TX, w_down_EMD.reshape(E * M, D), dtype=jnp.float32).astype(x_TD.dtype)
