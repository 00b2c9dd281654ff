"""Hand-written gradients of the small layers against autodiff of their plain definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model.layers import linear, swiglu


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def assert_same_value_and_gradients(f, g, *args):
    np.testing.assert_allclose(f(*args), g(*args), rtol=1e-5, atol=1e-5)
    everything = tuple(range(len(args)))
    ours, theirs = (jax.grad(lambda *a, f=f: jnp.sin(f(*a)).sum(), everything)(*args) for f in (f, g))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # float32 sums in another order


@pytest.mark.parametrize(
    ("batch", "outputs"), [((7,), (5,)), ((2, 3), (5,)), ((2, 3), (4, 5)), ((1, 1, 2), (2, 1, 3)), ((), (3,))]
)
def test_linear_equals_tensordot(batch, outputs):
    assert_same_value_and_gradients(linear, lambda x, w: jnp.tensordot(x, w, 1), normal(0, *batch, 6), normal(1, 6, *outputs))


def test_linear_computes_in_the_activations_dtype():
    x, w = normal(0, 3, 6).astype(jnp.bfloat16), normal(1, 6, 4)
    assert linear(x, w).dtype == jnp.bfloat16
    dx, dw = jax.grad(lambda x, w: linear(x, w).astype(jnp.float32).sum(), (0, 1))(x, w)
    assert (dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("batch", [(4,), (2, 3), ()])
def test_swiglu_equals_its_formula(batch):
    def formula(gate_up):
        return gate_up[..., 0, :] * jax.nn.sigmoid(gate_up[..., 0, :]) * gate_up[..., 1, :]

    assert_same_value_and_gradients(swiglu, formula, normal(0, *batch, 2, 5))
