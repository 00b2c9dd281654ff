"""Definition of grouped SwiGLU: every expert on every token, weighted by what the router chose."""

import jax
import jax.numpy as jnp

from pallas_kernels.products import einsum


def grouped_swiglu(x_TD, w_gate_up_ED2M, w_down_EMD, expert_TK, weight_TK):
    """See `api.grouped_swiglu`. E/K times the useful FLOPs: for tests only."""
    gate_up_ET2M = einsum("td,edxm->etxm", x_TD, w_gate_up_ED2M, dtype=jnp.float32)
    h_ETM = jax.nn.silu(gate_up_ET2M[:, :, 0]) * gate_up_ET2M[:, :, 1]
    y_ETD = einsum("etm,emd->etd", h_ETM.astype(x_TD.dtype), w_down_EMD, dtype=jnp.float32)
    onehot_TKE = jax.nn.one_hot(expert_TK, w_down_EMD.shape[0], dtype=jnp.float32)
    combine_TE = einsum("tke,tk->te", onehot_TKE, weight_TK.astype(jnp.float32))
    return einsum("te,etd->td", combine_TE, y_ETD).astype(x_TD.dtype)
