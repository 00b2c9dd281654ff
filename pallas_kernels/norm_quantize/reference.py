"""The definition of RMSNorm with quantisation, and the fast path on CPU."""

import jax
import jax.numpy as jnp

from pallas_kernels.quantize import reference
from pallas_kernels.scaled import Format, Scaled


def rms_norm_quantize(
    x_TD: jax.Array, scale_D: jax.Array, eps: float, format: Format, power_of_two: bool
) -> tuple[Scaled, jax.Array]:
    """See `api.rms_norm_quantize`."""
    x = x_TD.astype(jnp.float32)
    inverse_T = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=1) + eps)
    return reference.quantize(x * inverse_T[:, None] * scale_D, 1, format, power_of_two), inverse_T


def rms_norm_backward(
    x_TD: jax.Array, scale_D: jax.Array, inverse_T: jax.Array, dy_TD: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """See `api.rms_norm_backward`."""
    dy, normed = dy_TD.astype(jnp.float32), x_TD.astype(jnp.float32) * inverse_T[:, None]
    dnormed = dy * scale_D
    along = jnp.mean(dnormed * normed, axis=1, keepdims=True)
    return ((dnormed - normed * along) * inverse_T[:, None]).astype(x_TD.dtype), jnp.sum(dy * normed, axis=0)
