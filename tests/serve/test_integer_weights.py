"""A model of integer weights computes what the dense model of the same numbers does: prefill, decoding, whole sequences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dsv3_jax as dsv3
from dsv3_jax.checkpoint.integers import IntegerArray
from dsv3_jax.compression.container import integer_arrays_of
from dsv3_jax.compression.profile import Profile
from dsv3_jax.model.names import variables_by_name
from dsv3_jax.serve.cache import empty_cache, extend, unstack
from pallas_kernels.integer_weight import IntegerFormat, IntegerWeight
from tests.conftest import FIXTURES

W4 = Profile("w4", linears=IntegerFormat(4, 8), experts=IntegerFormat(4, 8), method="round")
BITS = Profile("bits", linears=IntegerFormat(8, 8), experts=IntegerFormat(2, 8, symmetric=False), method="round")


def nearest(w: np.ndarray, integer: IntegerArray) -> tuple[IntegerWeight, np.ndarray]:
    """(the integer weight, the dense one that it stands for); scales from each group's largest magnitude."""
    format, lead = integer.format, w.ndim - integer.inputs - integer.outputs
    inputs, outputs = w.shape[lead : lead + integer.inputs], w.shape[lead + integer.inputs :]
    grouped = w.reshape(*w.shape[:lead], -1, format.group, *outputs)
    scale = np.abs(grouped).max(lead + 1) / max(format.middle - 1, 1) + 1e-6
    scale = scale.astype(jnp.bfloat16).astype(np.float16)
    each = np.expand_dims(scale.astype(np.float32), lead + 1)
    codes = np.clip(np.round(grouped / each) + format.middle, 0, format.levels - 1).astype(np.uint8)
    dense = (each * (codes.astype(np.float32) - format.middle)).reshape(w.shape)
    per_byte = format.codes_per_byte
    codes = codes.reshape(*w.shape[:lead], -1, per_byte, *outputs)
    packed = sum(np.take(codes, i, lead + 1).astype(np.uint8) << (i * format.bits) for i in range(per_byte))
    zero = None if format.symmetric else jnp.full(scale.shape, format.middle, jnp.uint8)
    return IntegerWeight(jnp.asarray(packed), jnp.asarray(scale), zero, format, inputs, len(outputs)), dense


def rounded(profile: Profile):
    """(the model of integer weights, the dense model of the same numbers)."""
    pair = dsv3.load_hf(FIXTURES / "v3_tiny"), dsv3.load_hf(FIXTURES / "v3_tiny")
    integers, dense = (variables_by_name(nnx.state(model)) for model in pair)
    for name, integer in integer_arrays_of(pair[0].config, profile).items():
        weight, numbers = nearest(np.asarray(dense[name].get_value()), integer)
        integers[name].set_value(weight)
        dense[name].set_value(jnp.asarray(numbers))
    return pair


@pytest.fixture(scope="module", params=[W4, pytest.param(BITS, marks=pytest.mark.slow)], ids=lambda profile: profile.name)
def models(request):
    return rounded(request.param)


def test_generation_is_the_dense_models(models):
    model, dense = models
    out = np.asarray(dsv3.generate(model, np.random.default_rng(0).integers(0, 256, (1, 9)), 12))
    np.testing.assert_array_equal(out[:, 9:], np.asarray(dense(out))[:, 8:-1].argmax(-1))


def test_hidden_states_are_the_dense_models(models):
    """All at once; against the cache, a long piece (dense weights) and a few tokens (the kernels)."""
    model, dense = models
    ids = jnp.asarray(np.random.default_rng(1).integers(0, 256, (1, 24)))
    expected, _ = jax.jit(dense.hidden)(ids, jnp.zeros(ids.shape, jnp.int32))
    close = {"atol": 2e-5 * float(jnp.abs(expected).max())}  # float32 sums in another order
    found, _ = jax.jit(model.hidden)(ids, jnp.zeros(ids.shape, jnp.int32))
    np.testing.assert_allclose(found, expected, **close)
    cache = empty_cache(model.config, model.layout, 1, 24, jnp.dtype("float32"))
    run = jax.jit(lambda cache, ids, start: extend(model, unstack(model, ids.size), cache, ids, start))
    for start, end in ((0, 20), (20, 24)):
        found, cache = run(cache, ids[:, start:end], jnp.int32(start))
        np.testing.assert_allclose(found, expected[:, start:end], **close)
