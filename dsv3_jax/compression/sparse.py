"""SparseGPT (arXiv 2301.00774): half of the weights become zero, and those of later inputs make up for them.

A study of what masks cost: no export has them, because they shrink no file, and vLLM has dropped kernels for 2:4.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv3_jax.compression.gptq import damped, inverse_factor
from dsv3_jax.compression.saliency import keep_half
from pallas_kernels.products import dot


@partial(jax.jit, static_argnames="block")
def sparse_gpt(
    w_KN: Float[Array, "K N"], moments_KK: Float[Array, "K K"], block: int, damping: float = 0.01
) -> Float[Array, "K N"]:
    """A weight of whose every `block` inputs each output keeps half; 4 gives 2:4.

    Args:
        w_KN: f32[K, N], inputs first.
        moments_KK: f32[K, K], the sum of x^T x over the inputs x of the calibration set.
        block: Divides K. A block's mask is chosen once the inputs before it are done, by the error that zeroing a weight
            leaves after the others made up for it: w^2 / U[j, j]^2 (section 3.2), U as in gptq.py.
        damping: Is added to the diagonal, in units of its mean.
    """
    K, N = w_KN.shape
    u_KK = inverse_factor(damped(moments_KK, jnp.float32(damping)))

    def prune_block(i: Array, w_KN: Array) -> Array:
        begin = i * block
        rows_BK = jax.lax.dynamic_slice_in_dim(u_KK, begin, block)
        rows_BB = jax.lax.dynamic_slice_in_dim(rows_BK, begin, block, 1)
        w_BN = jax.lax.dynamic_slice_in_dim(w_KN, begin, block)
        kept_BN = keep_half(jnp.square(w_BN / jnp.diagonal(rows_BB)[:, None]))

        def prune_input(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            w_BN, errors_BN = carry
            error_N = jnp.where(kept_BN[j], 0, w_BN[j]) / rows_BB[j, j]
            return w_BN - rows_BB[j][:, None] * error_N, errors_BN.at[j].set(error_N)

        done_BN, errors_BN = jax.lax.fori_loop(0, block, prune_input, (w_BN, jnp.zeros((block, N), jnp.float32)))
        w_KN -= dot(rows_BK.T, errors_BN)  # U is upper triangular: nothing changes before the block
        return jax.lax.dynamic_update_slice_in_dim(w_KN, jnp.where(kept_BN, done_BN, 0), begin, 0)

    return jax.lax.fori_loop(0, K // block, prune_block, w_KN)
