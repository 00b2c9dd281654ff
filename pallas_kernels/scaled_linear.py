"""A linear layer whose three products take 8-bit operands (arXiv 2412.19437, section 3.3)."""

import functools
from typing import Literal

import jax
from jaxtyping import Array, Float

from pallas_kernels.quantize import reference
from pallas_kernels.quantize.api import quantize
from pallas_kernels.scaled import TILE, Format, Gemms, Scaled, dequantize
from pallas_kernels.scaled_matmul.api import scaled_matmul


def _quantized(x, rows: Literal[1, 128], format: Format, gemms: Gemms) -> Scaled:
    if gemms.per_tensor:
        return reference.quantize(x, None, format, gemms.power_of_two)
    return quantize(x, rows, format, gemms.power_of_two)


def _transposed(w: Scaled, gemms: Gemms) -> Scaled:
    return reference.with_one_scale(w.values.T, w.scales[0, 0]) if gemms.per_tensor else w.transposed()


def forward(x_TK: Float[Array, "T K"], w_KN: Float[Array, "K N"], gemms: Gemms) -> tuple[Float[Array, "T N"], Scaled]:
    """(x w in x's dtype, x in the 8 bits that the backward pass needs)."""
    x = _quantized(x_TK, 1, gemms.forward, gemms)
    w = _transposed(_quantized(w_KN, TILE, gemms.forward, gemms), gemms)
    return scaled_matmul(x, w, x_TK.dtype), x


def backward(
    x: Scaled, w_KN: Float[Array, "K N"], dy_TN: Float[Array, "T N"], gemms: Gemms
) -> tuple[Float[Array, "T K"], Float[Array, "K N"]]:
    """(dx in dy's dtype, dw in float32)."""
    dy = _quantized(dy_TN, 1, gemms.dgrad, gemms)
    dx_TK = scaled_matmul(dy, _quantized(w_KN, TILE, gemms.dgrad, gemms), dy_TN.dtype)
    # for the sum over tokens, both are quantised again in tiles along tokens: x from its 8 bits, dy from what came
    x_KT = _quantized(dequantize(x).T, 1, gemms.wgrad, gemms)
    dy_NT = _quantized(dy_TN.T, 1, gemms.wgrad, gemms)
    return dx_TK, scaled_matmul(x_KT, dy_NT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def scaled_linear(x_TK: Float[Array, "T K"], w_KN: Float[Array, "K N"], gemms: Gemms) -> Float[Array, "T N"]:
    """x w in x's dtype, from operands in `gemms`' formats; for the backward pass x is kept in 8 bits.

    The weights' gradient has their dtype. See `quantize` and `scaled_matmul` for kernels and platforms.
    """
    return forward(x_TK, w_KN, gemms)[0]


def _fwd(x_TK, w_KN, gemms: Gemms):
    y_TN, x = forward(x_TK, w_KN, gemms)
    return y_TN, (x, w_KN)


def _bwd(gemms: Gemms, residuals, dy_TN):
    x, w_KN = residuals
    dx_TK, dw_KN = backward(x, w_KN, dy_TN, gemms)
    return dx_TK, dw_KN.astype(w_KN.dtype)


scaled_linear.defvjp(_fwd, _bwd)
