"""The definition of SwiGLU with quantisation, and the fast path on CPU."""

import jax
import jax.numpy as jnp

from pallas_kernels.quantize import reference
from pallas_kernels.scaled import Format, Scaled, dequantize


def swiglu_quantize(gate_up_TX: jax.Array, format: Format, power_of_two: bool) -> tuple[Scaled, Scaled]:
    """See `api.swiglu_quantize`."""
    gate, up = jnp.split(gate_up_TX.astype(jnp.float32), 2, axis=1)
    h = jax.nn.silu(gate) * up
    return reference.quantize(h, 1, format, power_of_two), reference.quantize(gate_up_TX, 1, format, power_of_two)


def swiglu_backward(kept: Scaled, dh_TF: jax.Array, weight_T: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `api.swiglu_backward`."""
    gate, up = jnp.split(dequantize(kept), 2, axis=1)
    return backward(gate, up, dh_TF.astype(jnp.float32), weight_T[:, None], dh_TF.dtype)


def backward(gate, up, dh, weight, dtype):
    """(d[gate, up] and silu(gate) * up in `dtype`, float32 dweight) of one block of rows."""
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    h = silu * up
    dweight_T = jnp.sum(dh * h, axis=1)
    dh = dh * weight
    dgate_up = jnp.concatenate([dh * up * (sigmoid + silu * (1 - sigmoid)), dh * silu], axis=1)
    return dgate_up.astype(dtype), h.astype(dtype), dweight_T
