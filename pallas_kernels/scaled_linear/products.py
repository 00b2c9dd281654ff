"""The three products of a linear layer y = x w with 8-bit operands (arXiv 2412.19437, section 3.3 and figure 6).

Apart from the differentiable functions in `api`, because on a mesh every device computes these on its part.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.scaled import TILE, Gemms, Scaled
from pallas_kernels.scaled_linear.operands import quantized, quantized_transposed, swiglu_quantized, weights_transposed
from pallas_kernels.scaled_matmul.api import scaled_matmul
from pallas_kernels.swiglu_quantize import api as activation

RESIDUALS = "scaled_swiglu"  # checkpoint_name of the gate and what passes it, as the backward pass needs them


def forward(x_TK: Float[Array, "T K"], w_KN: Float[Array, "K N"], gemms: Gemms) -> tuple[Float[Array, "T N"], Scaled]:
    """(x w in x's dtype, x in the 8 bits that the backward pass needs)."""
    x = quantized(x_TK, 1, gemms.forward, gemms)
    w = weights_transposed(quantized(w_KN, TILE, gemms.forward, gemms), gemms)
    return scaled_matmul(x, w, x_TK.dtype, gemms.implementation), x


def _dgrad(w_KN, dy_TN, gemms: Gemms):
    dy = quantized(dy_TN, 1, gemms.dgrad, gemms)
    return scaled_matmul(dy, quantized(w_KN, TILE, gemms.dgrad, gemms), dy_TN.dtype, gemms.implementation)


def _wgrad(x_TK: jax.Array | Scaled, dy_TN, gemms: Gemms):
    x_KT, dy_NT = (quantized_transposed(a, gemms) for a in (x_TK, dy_TN))
    return scaled_matmul(x_KT, dy_NT, implementation=gemms.implementation)


def backward(
    x: Scaled, w_KN: Float[Array, "K N"], dy_TN: Float[Array, "T N"], gemms: Gemms
) -> tuple[Float[Array, "T K"], Float[Array, "K N"]]:
    """(dx in dy's dtype, dw in float32)."""
    return _dgrad(w_KN, dy_TN, gemms), _wgrad(x, dy_TN, gemms)


def swiglu_forward(
    gate_up_TX: Float[Array, "T X"], w_FN: Float[Array, "F N"], gemms: Gemms
) -> tuple[Float[Array, "T N"], Scaled]:
    """((silu(gate) * up) w in the input's dtype, [gate, up] in the 8 bits that the backward pass needs)."""
    h, gate_up = swiglu_quantized(gate_up_TX, gemms)
    w = weights_transposed(quantized(w_FN, TILE, gemms.forward, gemms), gemms)
    return scaled_matmul(h, w, gate_up_TX.dtype, gemms.implementation), gate_up


def swiglu_backward(
    gate_up: Scaled, w_FN: Float[Array, "F N"], dy_TN: Float[Array, "T N"], gemms: Gemms
) -> tuple[Float[Array, "T 2*F"], Float[Array, "F N"]]:
    """(d[gate, up] in dy's dtype, dw in float32)."""
    ones_T = jnp.ones(dy_TN.shape[0], jnp.float32)
    dgate_up_TX, h_TF, _ = activation.swiglu_backward(gate_up, _dgrad(w_FN, dy_TN, gemms), ones_T, gemms.implementation)
    return dgate_up_TX, _wgrad(h_TF, dy_TN, gemms)
