"""Products with weights in few bits (see `integer_weight`), for decoding: reading the weights is all that a few rows cost."""

from typing import Any

from jaxtyping import Array, Float, Int

from pallas_kernels import registry
from pallas_kernels.integer_linear import cpu, plain, reference, tpu
from pallas_kernels.integer_weight import IntegerWeight

for _name, _module in (("reference", reference), ("xla", plain), ("cpu", cpu), ("tpu", tpu)):
    registry.register("integer_linear", _name, _module.integer_linear)
    registry.register("integer_experts", _name, _module.integer_experts)


def integer_linear(
    x_TK: Float[Array, "T K"], w: IntegerWeight, implementation: str = "auto", interpret: Any = None
) -> Float[Array, "T ..."]:
    """x w in x's dtype, for a weight without leading axes: K are its inputs, whatever their shape, and its outputs stay.

    Implementations as in `registry`; `xla` makes the dense weight first. `cpu` is a C++ kernel with activations and sums in
    float32; it and `tpu` take at most `cpu.ROWS` rows. Not differentiable but by `reference` and `xla`.
    """
    return registry.run("integer_linear", implementation, (x_TK, w), interpret)


def integer_experts(
    x_TD: Float[Array, "T D"],
    w_gate_up_ED2M: IntegerWeight,
    w_down_EMD: IntegerWeight,
    expert_TK: Int[Array, "T K"],
    weight_TK: Float[Array, "T K"],
    implementation: str = "auto",
    interpret: Any = None,
) -> Float[Array, "T D"]:
    """`grouped_swiglu` of weights in few bits: y_t = sum_k weight_tk * swiglu_{expert_tk}(x_t) in x's dtype.

    Entries of `expert_TK` lie in [0, E), or are E for a choice that counts for nothing. Implementations as in `integer_linear`;
    `xla` makes one chosen expert's weights dense at a time. All read a chosen expert's codes where they lie, so that E may
    count all layers' experts.
    """
    return registry.run("integer_experts", implementation, (x_TD, w_gate_up_ED2M, w_down_EMD, expert_TK, weight_TK), interpret)
