"""The definition of the scaled matrix product, and the fast path on CPU."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.scaled import TILE, Scaled, dequantize


def scaled_matmul(a: Scaled, b: Scaled, dtype) -> jnp.ndarray:
    """See `api.scaled_matmul`. float32 holds a product of two such numbers exactly, so only sums are rounded."""
    both = (((1,), (1,)), ((), ()))
    y_MN = lax.dot_general(dequantize(a), dequantize(b), both, precision="highest", preferred_element_type=jnp.float32)
    return y_MN.astype(dtype)


def grouped_scaled_matmul(a: Scaled, b: Scaled, group_b, N: int, dtype) -> jnp.ndarray:
    """See `api.grouped_scaled_matmul`. Copies a group's matrix for each of its blocks: for tests."""
    a_bMK = dequantize(a).reshape(group_b.size, TILE, -1)
    b_bNK = dequantize(b).reshape(-1, N, a.values.shape[1])[group_b]
    y_bMN = jnp.einsum("bmk,bnk->bmn", a_bMK, b_bNK, precision="highest", preferred_element_type=jnp.float32)
    return y_bMN.reshape(-1, N).astype(dtype)
