"""Codes of gradients: kernels (interpreted) against the definition, which tests/exchange/test_compress.py holds to numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_jax.exchange.compress import Codec
from pallas_kernels.gradient_codes.api import mean_of_codes, pack_codes

INTERPRET = {"tpu": True, "hopper": plgpu.InterpretGPUParams()}
CODECS = [Codec(bits, levels=levels) for bits in (1, 2, 4, 8) for levels in ("gaussian", "uniform")]


def numbers(rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x, what is owed, units; of magnitudes from 1e-6 to 1e6, with a block of zeros and one that is not finite."""
    keys = jax.random.split(jax.random.key(rows), 4)
    size = 10.0 ** jax.random.uniform(keys[3], (rows, 1), minval=-6, maxval=6)
    x, owed = (size * jax.random.normal(key, (rows, 256)) for key in keys[:2])
    x, owed = x.at[0].set(0).at[-1, 3].set(jnp.nan), owed.at[0].set(0)
    return x, owed, jnp.exp(jax.random.normal(keys[2], x.shape))


@pytest.mark.parametrize("implementation", ["tpu", "hopper"])
@pytest.mark.parametrize("codec", CODECS, ids=lambda c: f"{c.bits}-{c.levels}")
def test_packing_kernels_equal_the_definition(implementation, codec):
    """But for numbers midway between two levels: fewer than one in a thousand, whose error says so."""
    for rows in (65, 130):
        x, owed, unit = numbers(rows)
        ours = pack_codes(x, owed, unit, codec.table, implementation, INTERPRET[implementation])
        theirs = pack_codes(x, owed, unit, codec.table, "reference")
        for a, b in zip(ours, theirs, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-6)
        assert (np.asarray(ours[0][:-1]) != np.asarray(theirs[0][:-1])).mean() < 1e-3
        finite = slice(0, rows - 1)
        sent = mean_of_codes(ours[0][None, finite], ours[1][None, finite], codec.table, "reference") * unit[finite]
        largest = np.abs(np.asarray(x + owed)[finite]).max(1, keepdims=True) * np.asarray(unit).max()
        assert (np.abs(sent + ours[2][finite] - (x + owed)[finite]) <= 1e-6 * largest).all()  # nothing is lost
        assert not np.asarray(ours[2][0]).any()
        assert not np.isfinite(np.asarray(ours[2][-1])).any()


@pytest.mark.parametrize("codec", CODECS, ids=lambda c: f"{c.bits}-{c.levels}")
def test_means_by_the_kernel_equal_the_definition(codec):
    for replicas, rows in ((1, 130), (3, 65)):
        random = np.random.default_rng(rows)
        codes = random.integers(0, 256, (replicas, rows, 32 * codec.bits), np.uint8)
        codes, scales = jnp.asarray(codes), jnp.asarray(random.standard_normal((replicas, rows)), jnp.float32)
        ours = mean_of_codes(codes, scales, codec.table, "tpu", interpret=True)
        np.testing.assert_allclose(ours, mean_of_codes(codes, scales, codec.table, "reference"), rtol=1e-5, atol=1e-6)
