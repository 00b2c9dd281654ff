"""Codecs: levels against the literature, codes against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.exchange.codec import Codec
from pallas_kernels.gradient_codes.api import mean_of_codes, pack_codes

CODECS = [Codec(bits, 32, levels) for bits in (1, 2, 4, 8) for levels in ("gaussian", "uniform")]


def named(codec: Codec) -> str:
    return f"{codec.bits}-{codec.levels}"


def nearest_in_numpy(codec: Codec, x: np.ndarray) -> np.ndarray:
    """Each number's nearest level, block by block, in float64."""
    out = np.empty_like(x, np.float64)
    table = np.asarray(codec.table.values, np.float64)
    for at in range(0, x.size, codec.block):
        block = x[at : at + codec.block].astype(np.float64)
        rms = codec.levels == "gaussian" and codec.bits < 8
        scale = np.sqrt((block**2).mean()) if rms else np.abs(block).max()
        out[at : at + codec.block] = scale * table[np.abs(block[:, None] / max(scale, 1e-300) - table).argmin(1)]
    return out


@pytest.mark.parametrize("codec", CODECS, ids=named)
def test_codes_stand_for_the_nearest_levels(codec):
    x = np.random.default_rng(0).standard_normal(32 * 40).astype(np.float32)
    x[:32], x[32:64] = 0, x[32:64] * 1e20
    rows = jnp.asarray(x).reshape(40, 32)
    codes, scales, left = pack_codes(rows, jnp.zeros_like(rows), jnp.ones_like(rows), codec.table)
    assert codes.nbytes + scales.nbytes == 40 * codec.block_bytes
    assert codes.dtype == jnp.uint8
    found, expected = np.asarray(mean_of_codes(codes[None], scales[None], codec.table)).reshape(-1), nearest_in_numpy(codec, x)
    np.testing.assert_allclose(codec.rounded(jnp.asarray(x)), found, rtol=1e-6)
    np.testing.assert_allclose(left, rows - found.reshape(40, 32), atol=1e-6 * np.abs(x).max())
    # a number midway between two levels may go to either
    distance = [np.abs(x.astype(np.float64) - y) for y in (found, expected)]
    largest = np.abs(x).reshape(40, 32).max(1).repeat(32)
    assert (np.abs(distance[0] - distance[1]) <= 1e-4 * distance[1] + 1e-6 * largest).all()
    assert (found[:32] == 0).all()


@pytest.mark.parametrize(("bits", "error"), [(1, 0.3634), (2, 0.1175), (4, 0.00954)])
def test_gaussian_levels_are_those_of_the_literature(bits, error):
    """Max (1960), table I: mean square errors for unit variance."""
    x = jax.random.normal(jax.random.key(0), (2**20,))
    codec = Codec(bits, 1024)
    assert float(jnp.mean((codec.rounded(x) - x) ** 2)) == pytest.approx(error, rel=0.02)
