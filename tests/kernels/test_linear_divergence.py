"""The divergence of two heads: values and gradients against the definition's, and against differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import linear_divergence
from pallas_kernels.measure import Tolerance, compare, normal, with_gradients

F32 = Tolerance("float32 sums in another order", relative=2e-5, of_largest=2e-5, floor=0.05)


def arguments(T, V=300):
    weight = jax.random.bernoulli(jax.random.key(2), 0.8, (T,)) / T
    return normal(0, T, 16), normal(1, 16, V), normal(2, T, 24), normal(3, 24, V), weight


@functools.partial(jax.jit, static_argnums=(0, 1))
def divergence_and_gradients(implementation, temperature, x, w, teacher_x, teacher_w, weight):
    def run(x, w):
        return 3 * linear_divergence(x, w, teacher_x, teacher_w, weight, temperature, implementation)

    return with_gradients(run, (x, w), {0: "dx", 1: "dw"})


@pytest.mark.parametrize(("T", "temperature"), [(700, 1.0), (512, 2.5), (1, 1.0)])
def test_chunks_equal_the_definition(T, temperature):
    """A chunk and a rest, a chunk alone, and a single token; `with_gradients` takes the output's gradient to be random."""
    found, expected = (divergence_and_gradients(how, temperature, *arguments(T)) for how in ("auto", "reference"))
    compare("linear_divergence", found, expected, dict.fromkeys(found, F32))


def test_the_definition_by_differences():
    """KL by NumPy in float64, and its derivative along a direction."""
    x, w, teacher_x, teacher_w, weight = (np.asarray(a, np.float64) for a in arguments(6, V=20))
    direction = np.random.default_rng(0).normal(size=x.shape)

    def kl(x, tau=2.0):
        def log_softmax(a):
            return a - a.max(-1, keepdims=True) - np.log(np.exp(a - a.max(-1, keepdims=True)).sum(-1, keepdims=True))

        log_p, log_q = log_softmax(teacher_x @ teacher_w / tau), log_softmax(x @ w / tau)
        return tau**2 * (weight * (np.exp(log_p) * (log_p - log_q)).sum(-1)).sum()

    def ours(x):
        return linear_divergence(x, *(jnp.asarray(a, jnp.float32) for a in (w, teacher_x, teacher_w, weight)), 2.0)

    value, gradient = jax.value_and_grad(ours)(jnp.asarray(x, jnp.float32))
    assert float(value) == pytest.approx(kl(x), rel=1e-5)
    slope = (kl(x + 1e-5 * direction) - kl(x - 1e-5 * direction)) / 2e-5
    assert float((np.asarray(gradient) * direction).sum()) == pytest.approx(slope, rel=1e-4)


def test_a_model_has_nothing_to_learn_from_itself():
    x, w, *_, weight = arguments(600)
    value, gradients = jax.value_and_grad(lambda x, w: linear_divergence(x, w, *arguments(600)[:2], weight), (0, 1))(x, w)
    assert float(value) == 0
    assert not any(np.asarray(g).any() for g in gradients)
