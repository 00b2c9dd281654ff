"""Products with integer weights in plain JAX: no more dense weights at a time than one expert's, or one linear layer's."""

from pallas_kernels.grouped_swiglu import blocked
from pallas_kernels.integer_linear.reference import integer_linear

__all__ = ["integer_experts", "integer_linear"]


def integer_experts(x_TD, w_gate_up_ED2M, w_down_EMD, expert_TK, weight_TK):
    """See `api.integer_experts`."""
    return blocked.forward(x_TD, w_gate_up_ED2M, w_down_EMD, expert_TK, weight_TK)[0]
