"""Plain JAX and what is not in `testing`'s suites: values and gradients over shapes that people use, odd ones too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import causal_attention, dense_is_worthwhile, dense_swiglu, grouped_swiglu, linear_cross_entropy
from pallas_kernels.grouped_swiglu.cases import experts_case
from pallas_kernels.measure import Tolerance, compare, normal, with_gradients

F32 = Tolerance("float32 sums of up to a few thousand terms in another order", relative=2e-5, of_largest=2e-5, floor=0.05)
EXPERTS = Tolerance("as float32's sums, of products of three matrices", relative=1e-4, of_largest=1e-4, floor=0.05)


# programs that are kept: a shape that comes again is not compiled again


@functools.partial(jax.jit, static_argnums=0)
def swiglu_and_gradients(implementation, choice, x, w_gate_up, w_down, weight):
    def run(x, w_gate_up, w_down, weight):
        return grouped_swiglu(x, w_gate_up, w_down, choice, weight, implementation=implementation)

    return with_gradients(run, (x, w_gate_up, w_down, weight), {0: "dx", 1: "dw_gate_up", 2: "dw_down", 3: "dweight"})


@functools.partial(jax.jit, static_argnums=(0, 1))
def attention_and_gradients(implementation, interpret, q, k, v, segment):
    def run(q, k, v):
        return causal_attention(q, k, v, segment, 0.2, implementation, interpret)

    return with_gradients(run, (q, k, v), {0: "dq", 1: "dk", 2: "dv"})


@functools.partial(jax.jit, static_argnums=0)
def cross_entropy_and_gradients(implementation, x, w, target, weight):
    def run(x, w):
        return linear_cross_entropy(x, w, target, weight, implementation)[0]

    correct = linear_cross_entropy(x, w, target, weight, implementation)[1]
    return with_gradients(run, (x, w), {0: "dx", 1: "dw"}) | {"correct": correct}


def assert_same(program, static, arguments, tolerance):
    """The same values and gradients by plain JAX, or what `static` starts with, as by the definition."""
    found, expected = (program(*which, *arguments) for which in (static, ("reference", *[None] * (len(static) - 1))))
    compare(program.__name__, found, expected, dict.fromkeys(found, tolerance))


@settings(max_examples=8, deadline=None)
@given(
    T=st.sampled_from([1, 2, 7, 64, 130]), D=st.sampled_from([3, 8, 16]), M=st.sampled_from([1, 5, 16]),
    E=st.sampled_from([2, 5, 8]), K=st.integers(1, 2), skew=st.sampled_from([0.0, 100.0]),
)  # fmt: skip
def test_grouped_swiglu_equals_its_reference(T, D, M, E, K, skew):
    choice, arrays = experts_case(T, D, M, E, K, skew, seed=T + D)
    assert_same(swiglu_and_gradients, ("xla",), (choice, *arrays), EXPERTS)


@pytest.mark.parametrize(("T", "E", "K"), [(700, 4, 2), (2048, 3, 2), (2100, 2, 2), (513, 2, 1)])
def test_grouped_swiglu_with_blocks_of_all_sizes(T, E, K):
    """Shares that fill the large blocks, with loads that leave every kind of rest; a hot expert drops no token."""
    for skew in (0.0, 1.0, 100.0):
        choice, arrays = experts_case(T, 8, 8, E, K, skew, seed=1)
        assert_same(swiglu_and_gradients, ("xla",), (choice, *arrays), EXPERTS)


@pytest.mark.parametrize(("T", "E", "K"), [(8, 4, 2), (1, 2, 2), (16, 8, 1)])
def test_dense_swiglu_equals_the_reference(T, E, K):
    assert dense_is_worthwhile(T, K, E)
    choice, (x, w_gate_up, w_down, weight) = experts_case(T, 6, 5, E, K, 1.0, seed=3)
    ours = dense_swiglu(x, jnp.moveaxis(w_gate_up, 0, 1), w_down, choice, weight)
    theirs = grouped_swiglu(x, w_gate_up, w_down, choice, weight, implementation="reference")
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_cpu_runs_the_blocked_experts():
    choice, args = experts_case(64, 8, 8, 4, 2, 0.0, seed=0)
    f = jax.jit(lambda x, w1, w2, weight: grouped_swiglu(x, w1, w2, choice, weight))
    assert "grouped_swiglu_blocked" in f.lower(*args).as_text(debug_info=True)
    assert "tpu_custom_call" not in f.lower(*args).as_text()


@settings(max_examples=8, deadline=None)
@given(
    L=st.sampled_from([1, 5, 8, 127, 128, 129, 300]), H=st.integers(1, 3), X=st.sampled_from([3, 24]),
    U=st.sampled_from([5, 16]), segments=st.integers(1, 4),
)  # fmt: skip
def test_blockwise_attention_equals_its_reference(L, H, X, U, segments):
    q, k, v = normal(L, 2, L, H, X), normal(L + 1, 2, L, H, X), normal(L + 2, 2, L, H, U)
    segment_BL = jnp.sort(jax.random.randint(jax.random.key(L), (2, L), 0, segments), axis=1)
    assert_same(attention_and_gradients, ("xla", None), (q, k, v, segment_BL), F32)


def test_hopper_attention_reads_each_sequences_own_segments():
    """Interpreted. Two sequences that differ in nothing but their segments: everything in one, and three."""
    q, k, v = (jnp.repeat(normal(i, 1, 64, 1, 64, dtype=jnp.bfloat16), 2, axis=0) for i in range(3))
    segment_BL = jnp.stack([jnp.zeros(64, jnp.int32), jnp.arange(64) // 22])
    of_bf16 = Tolerance("bfloat16 has 8 bits", relative=2e-2, of_largest=2e-2)
    assert_same(attention_and_gradients, ("hopper", plgpu.InterpretGPUParams()), (q, k, v, segment_BL), of_bf16)
    swapped = attention_and_gradients("reference", None, q, k, v, segment_BL[:1].repeat(2, axis=0))
    expected = attention_and_gradients("reference", None, q, k, v, segment_BL)
    for name, array in expected.items():  # each result depends on it
        assert np.abs(np.asarray(swapped[name][1] - array[1], np.float32)).max() > 0.1, name


def test_attention_never_holds_the_square_of_scores():
    L = 2048
    shape = jax.ShapeDtypeStruct((1, L, 2, 16), jnp.float32)
    segment = jax.ShapeDtypeStruct((1, L), jnp.int32)

    def loss(implementation):
        return jax.grad(
            lambda q, k, v, s: causal_attention(q, k, v, s, 1.0, implementation=implementation).sum(), argnums=(0, 1, 2)
        )

    text = jax.jit(loss("xla")).lower(shape, shape, shape, segment).compile().as_text()
    assert f"{L},{L}" not in text
    assert f"{L},{L}" in jax.jit(loss("reference")).lower(shape, shape, shape, segment).compile().as_text()


@settings(max_examples=7, deadline=None)
@given(T=st.sampled_from([1, 6, 511, 512, 513, 1100]), D=st.sampled_from([4, 17]), V=st.sampled_from([2, 33, 257]))
def test_cross_entropy_equals_its_reference(T, D, V):
    x, w = normal(T, T, D), normal(V, D, V)
    target = jax.random.randint(jax.random.key(1), (T,), 0, V)
    weight = jax.random.bernoulli(jax.random.key(2), 0.8, (T,)) / T

    assert_same(cross_entropy_and_gradients, ("xla",), (x, w, target, weight), F32)
    ours, theirs = (cross_entropy_and_gradients(i, x, w, target, weight)["correct"] for i in ("xla", "reference"))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize(("kernel", "arguments"), [(grouped_swiglu, 5), (causal_attention, 5), (linear_cross_entropy, 4)])
def test_an_unknown_implementation_is_an_error(kernel, arguments):
    with pytest.raises((KeyError, ValueError), match="fastest"):
        kernel(*[jnp.zeros((2, 2))] * arguments, implementation="fastest")
