"""The definition of the scaled matrix product, and the fast path on CPU."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.products import dot_general
from pallas_kernels.scaled import TILE, Scaled, dequantize

_BOTH = (((1,), (1,)), ((), ()))  # dimension numbers: the last axis of both is summed over


def _rows(x, block):
    return lax.dynamic_slice_in_dim(x, block * TILE, TILE)


def scaled_matmul(a: Scaled, b: Scaled, dtype) -> jnp.ndarray:
    """See `api.scaled_matmul`. float32 holds a product of two such numbers exactly, so only sums are rounded."""
    y_MN = dot_general(dequantize(a), dequantize(b), _BOTH, jnp.float32)
    return y_MN.astype(dtype)


def grouped_scaled_matmul(a: Scaled, b: Scaled, group_b, N: int, dtype) -> jnp.ndarray:
    """See `api.grouped_scaled_matmul`."""
    R, b_GNK = a.values.shape[0], dequantize(b).reshape(-1, N, a.values.shape[1])
    scales_RK = a.row_scales().T

    def block(i, y_RN):
        rows = Scaled(_rows(a.values, i), _rows(scales_RK, i).T)
        y = dot_general(dequantize(rows), b_GNK[group_b[i]], _BOTH, jnp.float32)
        return lax.dynamic_update_slice_in_dim(y_RN, y.astype(dtype), i * TILE, 0)

    return lax.fori_loop(0, jnp.sum(group_b < b_GNK.shape[0]), block, jnp.zeros((R, N), dtype))


def grouped_scaled_wgrad(a: Scaled, b: Scaled, group_b, groups: int, dtype) -> jnp.ndarray:
    """See `api.grouped_scaled_wgrad`."""
    a_RA, b_RB = dequantize(a).T, dequantize(b).T

    def block(i, y_GAB):
        y = dot_general(_rows(a_RA, i), _rows(b_RB, i), (((0,), (0,)), ((), ())))
        return y_GAB.at[group_b[i]].add(y)

    init = jnp.zeros((groups, a_RA.shape[1], b_RB.shape[1]), jnp.float32)
    return lax.fori_loop(0, jnp.sum(group_b < groups), block, init).astype(dtype)
