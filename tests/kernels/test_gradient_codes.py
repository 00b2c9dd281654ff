"""Codes of gradients: the suite has the levels of training. tests/exchange/test_codec.py holds the definition to NumPy."""

import numpy as np
import pytest

from dsv3_jax.exchange.codec import Codec
from pallas_kernels.gradient_codes.cases import LEVELS

CODECS = {f"{bits} bits {levels}": Codec(bits, levels=levels) for bits in (1, 2, 4, 8) for levels in ("gaussian", "uniform")}


@pytest.mark.parametrize("name", CODECS)
def test_the_suite_has_the_levels_of_training(name):
    table = CODECS[name].table
    suite = LEVELS[name.replace("8 bits gaussian", "8 bits uniform")]  # 8 bits are always uniform
    assert suite.of_rms == table.of_rms
    np.testing.assert_allclose(suite.values, table.values, atol=1e-3)
