"""Definition of products with integer weights: the dense weights, in the activations' dtype, then the product."""

import math

from pallas_kernels.grouped_swiglu import reference
from pallas_kernels.integer_weight import dequantize
from pallas_kernels.products import dot


def integer_linear(x_TK, w):
    """See `api.integer_linear`."""
    K = math.prod(w.inputs)
    y_TX = dot(x_TK, dequantize(w).reshape(K, -1).astype(x_TK.dtype))
    return y_TX.reshape(x_TK.shape[0], *w.shape[len(w.inputs) :])


def integer_experts(x_TD, w_gate_up_ED2M, w_down_EMD, expert_TK, weight_TK):
    """See `api.integer_experts`."""
    gate_up, down = (dequantize(w).astype(x_TD.dtype) for w in (w_gate_up_ED2M, w_down_EMD))
    return reference.grouped_swiglu(x_TD, gate_up, down, expert_TK, weight_TK)
