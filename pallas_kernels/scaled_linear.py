"""A linear layer whose three products take 8-bit operands (arXiv 2412.19437, section 3.3)."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from pallas_kernels.quantize import reference
from pallas_kernels.quantize.api import quantize, quantize_transposed
from pallas_kernels.scaled import TILE, Format, Gemms, Scaled, bits, dequantize, from_bits
from pallas_kernels.scaled_matmul.api import scaled_matmul
from pallas_kernels.swiglu_quantize import api as activation
from pallas_kernels.swiglu_quantize.api import swiglu_quantize

RESIDUALS = "scaled_swiglu"  # checkpoint_name of the gate and what passes it, as the backward pass needs them


def quantized(x, rows: Literal[1, 128], format: Format, gemms: Gemms) -> Scaled:
    """As `gemms` says: with scales for tiles or blocks, or with one."""
    if gemms.per_tensor:
        return reference.quantize(x, None, format, gemms.power_of_two)
    return quantize(x, rows, format, gemms.power_of_two, gemms.implementation)


def quantized_transposed(x: jax.Array | Scaled, gemms: Gemms) -> Scaled:
    """An operand of the weights' gradient: x^T, with scales for tiles along tokens or with one."""
    if gemms.per_tensor:
        x = dequantize(x) if isinstance(x, Scaled) else x
        return reference.quantize(x.T, None, gemms.wgrad, gemms.power_of_two)
    return quantize_transposed(x, gemms.wgrad, gemms.power_of_two, gemms.implementation)


def _transposed(w: Scaled, gemms: Gemms) -> Scaled:
    return reference.with_one_scale(w.values.T, w.scales[0, 0]) if gemms.per_tensor else w.transposed()


def forward(x_TK: Float[Array, "T K"], w_KN: Float[Array, "K N"], gemms: Gemms) -> tuple[Float[Array, "T N"], Scaled]:
    """(x w in x's dtype, x in the 8 bits that the backward pass needs)."""
    x = quantized(x_TK, 1, gemms.forward, gemms)
    w = _transposed(quantized(w_KN, TILE, gemms.forward, gemms), gemms)
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
    gate_up_TX: Float[Array, "T 2*F"], w_FN: Float[Array, "F N"], gemms: Gemms
) -> tuple[Float[Array, "T N"], Scaled]:
    """((silu(gate) * up) w in the input's dtype, [gate, up] in the 8 bits that the backward pass needs)."""
    h, gate_up = swiglu_quantized(gate_up_TX, gemms)
    w = _transposed(quantized(w_FN, TILE, gemms.forward, gemms), gemms)
    return scaled_matmul(h, w, gate_up_TX.dtype, gemms.implementation), gate_up


def swiglu_quantized(gate_up_TX: Float[Array, "T 2*F"], gemms: Gemms) -> tuple[Scaled, Scaled]:
    """As `swiglu_quantize`."""
    if not gemms.per_tensor:
        return swiglu_quantize(gate_up_TX, gemms.forward, gemms.power_of_two, gemms.implementation)
    gate, up = jnp.split(gate_up_TX.astype(jnp.float32), 2, axis=1)
    return quantized(jax.nn.silu(gate) * up, 1, gemms.forward, gemms), quantized(gate_up_TX, 1, gemms.forward, gemms)


def swiglu_backward(
    gate_up: Scaled, w_FN: Float[Array, "F N"], dy_TN: Float[Array, "T N"], gemms: Gemms
) -> tuple[Float[Array, "T 2*F"], Float[Array, "F N"]]:
    """(d[gate, up] in dy's dtype, dw in float32)."""
    ones_T = jnp.ones(dy_TN.shape[0], jnp.float32)
    dgate_up_TX, h_TF, _ = activation.swiglu_backward(gate_up, _dgrad(w_FN, dy_TN, gemms), ones_T, gemms.implementation)
    return dgate_up_TX, _wgrad(h_TF, dy_TN, gemms)


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
def scaled_swiglu_linear(gate_up_TX: Float[Array, "T 2*F"], w_FN: Float[Array, "F N"], gemms: Gemms) -> Float[Array, "T N"]:
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
