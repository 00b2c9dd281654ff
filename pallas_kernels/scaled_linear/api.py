"""A linear layer whose three products take 8-bit operands (arXiv 2412.19437, section 3.3)."""

import functools

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from pallas_kernels.scaled import Gemms, bits, from_bits
from pallas_kernels.scaled_linear.products import RESIDUALS, backward, forward, swiglu_backward, swiglu_forward


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def scaled_linear(x_TK: Float[Array, "T K"], w_KN: Float[Array, "K N"], gemms: Gemms) -> Float[Array, "T N"]:
    """x w in x's dtype, from operands in `gemms`' formats; for the backward pass x is kept in 8 bits.

    The weights' gradient has their dtype. See `quantize` and `scaled_matmul` for kernels and platforms.
    """
    return forward(x_TK, w_KN, gemms)[0]


def _fwd(x_TK, w_KN, gemms: Gemms):
    y_TN, x = forward(x_TK, w_KN, gemms)
    return y_TN, (bits(x), w_KN)


def _bwd(gemms: Gemms, residuals, dy_TN):
    x, w_KN = residuals
    dx_TK, dw_KN = backward(from_bits(x, gemms.forward), w_KN, dy_TN, gemms)
    return dx_TK, dw_KN.astype(w_KN.dtype)


scaled_linear.defvjp(_fwd, _bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def scaled_swiglu_linear(gate_up_TX: Float[Array, "T X"], w_FN: Float[Array, "F N"], gemms: Gemms) -> Float[Array, "T N"]:
    """(silu(gate) * up) w as `scaled_linear`; for the backward pass [gate, up] is kept in 8 bits, their product not at all."""
    return swiglu_forward(gate_up_TX, w_FN, gemms)[0]


def _swiglu_fwd(gate_up_TX, w_FN, gemms: Gemms):
    y_TN, gate_up = swiglu_forward(gate_up_TX, w_FN, gemms)
    return y_TN, (checkpoint_name(bits(gate_up), RESIDUALS), w_FN)


def _swiglu_bwd(gemms: Gemms, residuals, dy_TN):
    gate_up, w_FN = residuals
    dgate_up_TX, dw_FN = swiglu_backward(from_bits(gate_up, gemms.forward), w_FN, dy_TN, gemms)
    return dgate_up_TX, dw_FN.astype(w_FN.dtype)


scaled_swiglu_linear.defvjp(_swiglu_fwd, _swiglu_bwd)
