"""The definition of the scaled matrix product, and the fast path on CPU."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.scaled import Scaled, dequantize


def scaled_matmul(a: Scaled, b: Scaled, dtype) -> jnp.ndarray:
    """See `api.scaled_matmul`. float32 holds a product of two such numbers exactly, so only sums are rounded."""
    both = (((1,), (1,)), ((), ()))
    y_MN = lax.dot_general(dequantize(a), dequantize(b), both, precision="highest", preferred_element_type=jnp.float32)
    return y_MN.astype(dtype)
