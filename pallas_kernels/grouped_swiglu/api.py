"""Grouped SwiGLU: the routed experts of a DeepSeekMoE layer (arXiv 2412.19437, equations 12-13), dropless."""

from typing import Any

from jaxtyping import Array, Float, Int

from pallas_kernels import registry
from pallas_kernels.grouped_swiglu import blocked, megablox, reference, scaled
from pallas_kernels.scaled import Gemms

for _name, _module in (("reference", reference), ("xla", blocked), ("tpu", megablox)):
    registry.register("grouped_swiglu", _name, _module.grouped_swiglu)


def grouped_swiglu(
    x_TD: Float[Array, "T D"],
    w_gate_up_ED2M: Float[Array, "E D 2 M"],
    w_down_EMD: Float[Array, "E M D"],
    expert_TK: Int[Array, "T K"],
    weight_TK: Float[Array, "T K"],
    gemms: Gemms | None = None,
    implementation: str = "auto",
    interpret: Any = None,
) -> Float[Array, "T D"]:
    """y_t = sum_k weight_tk * swiglu_{expert_tk}(x_t), with swiglu_e(x) = (silu(x W_gate) * (x W_up)) W_down.

    No token is dropped, whatever the load of an expert. Weights have x's dtype; `weight_TK` is float32. Differentiable in
    everything but `expert_TK`, whose entries lie in [0, E), or are E for a choice that counts for nothing.

    Implementations as in `registry`. `xla` cuts each expert's tokens into blocks and loops over those that exist; `tpu` is
    JAX's grouped product, megablox. (`jax.lax.ragged_dot` is a grouped product on v5p alone; XLA makes a dense one of all
    tokens and all experts elsewhere, in time and memory.)

    With `gemms`, all products take 8-bit operands (see `scaled_linear`), by the kernels that `gemms.implementation` names.
    Raises `ValueError` if `implementation` is named beside it.
    """
    arguments = x_TD, w_gate_up_ED2M, w_down_EMD, expert_TK, weight_TK
    if gemms is None:
        return registry.run("grouped_swiglu", implementation, arguments, interpret)
    if implementation != "auto":
        raise ValueError(f"grouped_swiglu: 8-bit products run by gemms.implementation, not implementation={implementation!r}")
    return scaled.grouped_swiglu(*arguments, gemms)
