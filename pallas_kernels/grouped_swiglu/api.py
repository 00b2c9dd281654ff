"""Grouped SwiGLU: the routed experts of a DeepSeekMoE layer (arXiv 2412.19437, equations 12-13), dropless."""

from typing import Literal

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_swiglu import blocked, megablox, reference, scaled
from pallas_kernels.scaled import Gemms

_IMPLEMENTATIONS = {
    "reference": reference.grouped_swiglu,
    "blocked": blocked.grouped_swiglu,
    "megablox": megablox.grouped_swiglu,
}


def grouped_swiglu(
    x_TD: Float[Array, "T D"],
    w_gate_up_ED2M: Float[Array, "E D 2 M"],
    w_down_EMD: Float[Array, "E M D"],
    expert_TK: Int[Array, "T K"],
    weight_TK: Float[Array, "T K"],
    gemms: Gemms | None = None,
    implementation: Literal["auto", "blocked", "megablox", "reference"] = "auto",
) -> Float[Array, "T D"]:
    """y_t = sum_k weight_tk * swiglu_{expert_tk}(x_t), with swiglu_e(x) = (silu(x W_gate) * (x W_up)) W_down.

    No token is dropped, whatever the load of an expert. Weights have x's dtype; `weight_TK` is float32. Differentiable in
    everything but `expert_TK`, whose entries lie in [0, E), or are E for a choice that counts for nothing.

    `blocked` cuts each expert's tokens into blocks and loops over those that exist. `megablox` is JAX's grouped product for
    TPU, which "auto" takes there. (`jax.lax.ragged_dot` is a grouped product on v5p alone; XLA makes a dense one of all tokens
    and all experts elsewhere, in time and memory.)

    With `gemms`, all products take 8-bit operands (see `scaled_linear`), by the kernels that `gemms.implementation` names.
    """
    if gemms is not None:
        assert implementation == "auto", f"grouped_swiglu has no 8-bit {implementation} implementation"
        return scaled.grouped_swiglu(x_TD, w_gate_up_ED2M, w_down_EMD, expert_TK, weight_TK, gemms)
    if implementation == "auto":
        return jax.lax.platform_dependent(
            x_TD, w_gate_up_ED2M, w_down_EMD, expert_TK, weight_TK,
            tpu=_IMPLEMENTATIONS["megablox"], default=_IMPLEMENTATIONS["blocked"],
        )  # fmt: skip
    return _IMPLEMENTATIONS[implementation](x_TD, w_gate_up_ED2M, w_down_EMD, expert_TK, weight_TK)
