"""The definition of quantisation, and the fast path on CPU."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.scaled import DTYPES, LARGEST, TILE, Format, Scaled, dequantize, pad_to_tiles, tiles

SMALLEST = 1e-30  # least that is taken for a tile's largest magnitude: a tile of zeros has a scale too


def to_power_of_two(scale):
    """The next power of two that is not smaller, by its bits: exact, and what kernels can do."""
    bits = lax.bitcast_convert_type(scale, jnp.int32)
    return lax.bitcast_convert_type((bits + 0x7FFFFF) & 0x7F800000, jnp.float32)


def scale_of(amax, format: Format, power_of_two: bool):
    scale = jnp.maximum(amax, SMALLEST) * (1 / LARGEST[format])
    return to_power_of_two(scale) if power_of_two else scale


def encode(x, inverse, format: Format):
    """x / scale in the format, saturating. NaN and infinities give NaN (int8 has none: they saturate)."""
    scaled = jnp.clip(x * inverse, -LARGEST[format], LARGEST[format])
    return jnp.round(scaled).astype(jnp.int8) if format == "int8" else scaled.astype(DTYPES[format])


def quantize(x, rows: int | None, format: Format, power_of_two: bool) -> Scaled:
    """See `api.quantize`; `rows` None: one scale for all of x."""
    if rows is None:
        scale = scale_of(jnp.max(jnp.abs(x.astype(jnp.float32))), format, power_of_two)
        return with_one_scale(encode(x.astype(jnp.float32), 1 / scale, format), scale)
    M, K = x.shape
    x = pad_to_tiles(x.astype(jnp.float32), rows).reshape(-1, rows, tiles(K), TILE)
    scale = scale_of(jnp.max(jnp.abs(x), axis=(1, 3)), format, power_of_two)
    values = encode(x, (1 / scale)[:, None, :, None], format)
    return Scaled(values.reshape(-1, tiles(K) * TILE)[:M, :K], scale.T)


def quantize_transposed(x: jax.Array | Scaled, format: Format, power_of_two: bool) -> Scaled:
    """See `api.quantize_transposed`."""
    return quantize((dequantize(x) if isinstance(x, Scaled) else x).T, 1, format, power_of_two)


def with_one_scale(values, scale) -> Scaled:
    M, K = values.shape
    return Scaled(values, jnp.broadcast_to(scale, (tiles(K), M)))


def rounded(x: jax.Array, rows: int | None, format: Format, power_of_two: bool) -> jax.Array:
    """x after quantisation, in float32: `dequantize(quantize(x))` without the detour over layouts."""
    (M, K), group = x.shape, rows or 1
    x = pad_to_tiles(x.astype(jnp.float32), group).reshape(-1, group, tiles(K), TILE)
    amax = jnp.max(jnp.abs(x), axis=(1, 3) if rows else None, keepdims=True)
    scale = scale_of(amax, format, power_of_two)
    return (encode(x, 1 / scale, format).astype(jnp.float32) * scale).reshape(-1, tiles(K) * TILE)[:M, :K]
