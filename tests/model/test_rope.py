"""Rotary embedding, YaRN, and what attention makes of its input, by hand."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import RopeConfig
from dsv3_jax.model.attention import Attention
from dsv3_jax.model.layers import RMSNorm
from dsv3_jax.model.layout import Layout
from dsv3_jax.model.rope import attention_scale, rope_table, rotate
from dsv3_jax.precision.recipes import RECIPES
from tests.model.test_model import MICRO

PLAIN = dataclasses.replace(MICRO, rope_parameters=RopeConfig(rope_theta=100.0))
# turning twice and half a time over the original context: dimensions 0.50 and 1.10, rounded to 0 and 2
YARN = dataclasses.replace(
    MICRO,
    rope_parameters=RopeConfig(
        rope_theta=100.0, rope_type="yarn", factor=4.0, original_max_position_embeddings=40, beta_fast=2.0, beta_slow=0.5,
        mscale=0.7, mscale_all_dim=0.4,
    ),
)  # fmt: skip


def test_pairs_turn_by_their_angles():
    """Four dimensions: pairs (0, 2) and (1, 3), which turn by 1 and 0.1 a place; at place 3, with and without heads."""
    table = rope_table(PLAIN, jnp.asarray([[3]]))
    c, s, d, t = math.cos(3), math.sin(3), math.cos(0.3), math.sin(0.3)
    expected = [1 * c - 3 * s, 2 * d - 4 * t, 3 * c + 1 * s, 4 * d + 2 * t]
    x = jnp.asarray([1.0, 2.0, 3.0, 4.0])
    np.testing.assert_allclose(rotate(x[None, None], table)[0, 0], expected, rtol=1e-5)
    np.testing.assert_allclose(rotate(jnp.tile(x, (1, 1, 2, 1)), table)[0, 0], [expected] * 2, rtol=1e-5)


def test_yarn_slows_the_slow_dimensions():
    """The first stays; the second is half way between 0.1 and a quarter of it. All grow by the ratio of two temperatures."""
    cos, _ = rope_table(YARN, jnp.asarray([[5]]))
    magnitude = (0.07 * math.log(4) + 1) / (0.04 * math.log(4) + 1)
    np.testing.assert_allclose(cos[0, 0], [math.cos(5) * magnitude, math.cos(5 * 0.0625) * magnitude], rtol=1e-5)


def test_scores_are_scaled_by_the_whole_key():
    assert attention_scale(PLAIN) == pytest.approx((6 + 4) ** -0.5)
    assert attention_scale(YARN) == pytest.approx((6 + 4) ** -0.5 * (0.04 * math.log(4) + 1) ** 2)


def test_norm_by_hand():
    norm = RMSNorm(2, eps=12.5)
    norm.scale[...] = jnp.asarray([1.0, 2.0])
    np.testing.assert_allclose(norm(jnp.asarray([3.0, 4.0])), [3 / 5, 2 * 4 / 5], rtol=1e-6)


def test_what_is_cached_is_normalised_and_rotated():
    attention = Attention(PLAIN, Layout(), RECIPES["float32"], nnx.Rngs(0))
    x_BLD = jnp.ones((1, 2, MICRO.hidden_size)) * jnp.asarray([1.0, 5.0])[:, None]
    c_BLC, k_BLR = attention.latents(x_BLD, rope_table(PLAIN, jnp.asarray([[0, 1]])))
    np.testing.assert_allclose(c_BLC[0, 0], c_BLC[0, 1], rtol=1e-4)  # the same direction, whatever its length
    np.testing.assert_allclose(jnp.square(c_BLC).mean(-1), 1.0, rtol=1e-4)
    np.testing.assert_allclose(jnp.linalg.norm(k_BLR[0, 1]), 5 * jnp.linalg.norm(k_BLR[0, 0]), rtol=1e-5)
    assert not np.allclose(k_BLR[0, 1], 5 * k_BLR[0, 0])
