"""The operands of a linear layer's products, in 8 bits as a `Gemms` says: scales for tiles and blocks, or one for an array."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.quantize import reference
from pallas_kernels.quantize.api import quantize, quantize_transposed
from pallas_kernels.scaled import Format, Gemms, Scaled, dequantize
from pallas_kernels.swiglu_quantize.api import swiglu_quantize


def quantized(x, rows: Literal[1, 128], format: Format, gemms: Gemms) -> Scaled:
    """x in 8 bits with scales for tiles of 1 x 128 or blocks of 128 x 128, or with one scale, as `gemms` says."""
    if gemms.per_tensor:
        return reference.quantize(x, None, format, gemms.power_of_two)
    return quantize(x, rows, format, gemms.power_of_two, gemms.implementation)


def quantized_transposed(x: jax.Array | Scaled, gemms: Gemms) -> Scaled:
    """x^T, an operand of the weights' gradient, with scales for tiles along tokens or with one."""
    if gemms.per_tensor:
        x = dequantize(x) if isinstance(x, Scaled) else x
        return reference.quantize(x.T, None, gemms.wgrad, gemms.power_of_two)
    return quantize_transposed(x, gemms.wgrad, gemms.power_of_two, gemms.implementation)


def weights_transposed(w: Scaled, gemms: Gemms) -> Scaled:
    return reference.with_one_scale(w.values.T, w.scales[0, 0]) if gemms.per_tensor else w.transposed()


def swiglu_quantized(gate_up_TX: Float[Array, "T X"], gemms: Gemms) -> tuple[Scaled, Scaled]:
    """(silu(gate) * up, [gate, up]) in 8 bits; see `swiglu_quantize`."""
    if not gemms.per_tensor:
        return swiglu_quantize(gate_up_TX, gemms.forward, gemms.power_of_two, gemms.implementation)
    gate, up = jnp.split(gate_up_TX.astype(jnp.float32), 2, axis=1)
    return quantized(jax.nn.silu(gate) * up, 1, gemms.forward, gemms), quantized(gate_up_TX, 1, gemms.forward, gemms)
