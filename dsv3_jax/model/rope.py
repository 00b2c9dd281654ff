"""Rotary position embedding and its YaRN extension (arXiv 2104.09864; YaRN: arXiv 2309.00071).

Rotates halves: the pair of dimension i is i + R/2. Released checkpoints interleave their pairs (2i, 2i+1); `interop`
permutes those rows of the projections on the way in and out, so that nothing here is strided.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig, RopeConfig


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _inverse_frequencies(rope: RopeConfig, dim: int) -> np.ndarray:
    """f32[R/2] radians per position; YaRN blends interpolation (slow dimensions) with extrapolation (fast ones)."""
    frequency = rope.rope_theta ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))
    if rope.rope_type == "default":
        return (1.0 / frequency).astype(np.float32)

    def correction_dim(rotations: float) -> float:
        """The dimension that turns `rotations` times over the original context."""
        return (
            dim * math.log(rope.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(rope.rope_theta))
        )

    low, high = correction_dim(rope.beta_fast), correction_dim(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # as transformers does: avoids 0 / 0
    extrapolate = 1 - np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    return ((1 - extrapolate) / (rope.factor * frequency) + extrapolate / frequency).astype(np.float32)


def rope_table(config: ModelConfig, position_BL: Int[Array, "B L"]) -> tuple[Float[Array, "B L r"], Float[Array, "B L r"]]:
    """cos and sin of every position's angles, float32, r = qk_rope_head_dim / 2."""
    rope = config.rope_parameters
    angle_BLr = position_BL[..., None].astype(jnp.float32) * _inverse_frequencies(rope, config.qk_rope_head_dim)
    magnitude = 1.0
    if rope.rope_type == "yarn":
        if rope.attention_factor is not None:
            magnitude = rope.attention_factor
        elif rope.mscale and rope.mscale_all_dim:
            magnitude = _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
        else:
            magnitude = _mscale(rope.factor, 1.0)
    return jnp.cos(angle_BLr) * magnitude, jnp.sin(angle_BLr) * magnitude


def rotate(x: Float[Array, "B L *H R"], table: tuple[Array, Array]) -> Float[Array, "B L *H R"]:
    """Turn the pairs (x_i, x_{i+R/2}) by the angles of `table`; a heads axis may stand between L and R."""
    cos, sin = table
    if x.ndim == 4:
        cos, sin = cos[:, :, None], sin[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attention_scale(config: ModelConfig) -> float:
    """(N + R)^-0.5, times YaRN's temperature squared."""
    rope = config.rope_parameters
    scale = config.qk_head_dim**-0.5
    if rope.rope_type != "default" and rope.mscale_all_dim:
        scale *= _mscale(rope.factor, rope.mscale_all_dim) ** 2
    return scale
