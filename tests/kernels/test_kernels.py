"""Every implementation of every kernel against its reference: values and gradients, over shapes people use, odd ones too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import causal_attention, dense_is_worthwhile, dense_swiglu, grouped_swiglu, linear_cross_entropy
from pallas_kernels.linear_cross_entropy import hopper as logits_hopper
from pallas_kernels.linear_cross_entropy import tpu as logits_tpu
from pallas_kernels.linear_cross_entropy.statistics import logit_statistics

# float32 with sums of up to a few thousand terms in another order
F32 = {"rtol": 2e-5, "atol": 2e-5}


def normal(seed: int, *shape: int, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def assert_same(f, g, args, argnums, tolerance=None):
    """Same values and same gradients of a scalar of them, relative to each array's largest entry."""
    tolerance = tolerance or F32
    # under jit: the kernels' own use, and quicker than op by op
    for ours, theirs in zip(
        [jax.jit(f)(*args), *jax.jit(jax.grad(lambda *a: jnp.sin(f(*a).astype(jnp.float32)).sum(), argnums))(*args)],
        [g(*args), *jax.grad(lambda *a: jnp.sin(g(*a).astype(jnp.float32)).sum(), argnums)(*args)],
        strict=True,
    ):
        theirs = np.asarray(theirs, np.float32)
        # terms are of order 1 to 10: where they cancel (one key has a gradient of 0), what is left is their rounding, 1e-6
        scale = max(np.abs(theirs).max(), 0.05)
        np.testing.assert_allclose(np.asarray(ours, np.float32) / scale, theirs / scale, **tolerance)


def experts_case(T, D, M, E, K, skew, seed, dtype=jnp.float32):
    """Inputs whose experts' loads range from even (skew 0) to everything on the last K."""
    choice = jax.lax.top_k(normal(seed + 4, T, E) + skew * jnp.arange(E), K)[1]
    args = (
        normal(seed, T, D, dtype=dtype), normal(seed + 1, E, D, 2, M, dtype=dtype), normal(seed + 2, E, M, D, dtype=dtype),
        jax.random.uniform(jax.random.key(seed + 3), (T, K)),
    )  # fmt: skip
    return choice, args


@settings(max_examples=12, deadline=None)
@given(
    T=st.sampled_from([1, 2, 7, 64, 130]), D=st.sampled_from([3, 8, 16]), M=st.sampled_from([1, 5, 16]),
    E=st.sampled_from([2, 5, 8]), K=st.integers(1, 2), skew=st.sampled_from([0.0, 100.0]),
)  # fmt: skip
def test_grouped_swiglu_equals_its_reference(T, D, M, E, K, skew):
    choice, args = experts_case(T, D, M, E, K, skew, seed=T + D)

    def run(which):
        return lambda x, w1, w2, weight: grouped_swiglu(x, w1, w2, choice, weight, implementation=which)

    assert_same(run("xla"), run("reference"), args, (0, 1, 2, 3), {"rtol": 1e-4, "atol": 1e-4})


@pytest.mark.parametrize(
    ("T", "D", "M", "E", "K", "skew"),
    [(7, 16, 8, 4, 2, 0.0), (130, 3, 5, 5, 2, 0.0), (300, 200, 70, 4, 1, 0.0), (600, 130, 40, 3, 2, 100.0)],
)
def test_grouped_swiglu_for_tpu(T, D, M, E, K, skew):
    """JAX's TPU kernels, interpreted: tiles that rows, contraction and columns do not fill, several of them, empty experts, and
    slots without an expert, which count for nothing and have no gradient."""
    choice, args = experts_case(T, D, M, E, K, skew, seed=T + D)
    nowhere_T = jnp.arange(T) % 5 == 0
    choice = jnp.where(nowhere_T[:, None], E, choice)
    args = (args[0] / D, *args[1:])  # sums of order 1, whose sine (see assert_same) is no chaos

    def run(which):
        return lambda x, w1, w2, weight: grouped_swiglu(x, w1, w2, choice, weight, implementation=which)

    with pltpu.force_tpu_interpret_mode():
        assert_same(run("tpu"), run("reference"), args, (0, 1, 2, 3), {"rtol": 1e-4, "atol": 1e-4})
        dx, dweight = jax.jit(jax.grad(lambda *a: run("tpu")(*a).sum(), (0, 3)))(*args)
    assert not dx[nowhere_T].any()
    assert not dweight[nowhere_T].any()


@pytest.mark.parametrize("skew", [0.0, 1.0, 100.0])
@pytest.mark.parametrize(("T", "E", "K"), [(700, 4, 2), (2048, 3, 2), (2100, 2, 2), (513, 2, 1)])
def test_grouped_swiglu_with_blocks_of_all_sizes(T, E, K, skew):
    """Shares that fill the large blocks, with loads that leave every kind of rest; a hot expert drops no token."""
    choice, args = experts_case(T, 8, 8, E, K, skew, seed=1)

    def run(which):
        return lambda x, w1, w2, weight: grouped_swiglu(x, w1, w2, choice, weight, implementation=which)

    assert_same(run("xla"), run("reference"), args, (0, 1, 2, 3), {"rtol": 1e-4, "atol": 1e-4})


def test_grouped_swiglu_in_bfloat16():
    choice, args = experts_case(256, 16, 16, 4, 2, 0.0, seed=5, dtype=jnp.bfloat16)
    ours = grouped_swiglu(*args[:3], choice, args[3], implementation="xla")
    wide = grouped_swiglu(*(a.astype(jnp.float32) for a in args[:3]), choice, args[3], implementation="reference")
    assert ours.dtype == jnp.bfloat16
    error = np.linalg.norm(np.asarray(ours, np.float32) - wide) / np.linalg.norm(wide)
    assert error < 0.01  # a few roundings of 2^-9 each


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


@settings(max_examples=12, deadline=None)
@given(
    L=st.sampled_from([1, 5, 8, 127, 128, 129, 300]), H=st.integers(1, 3), X=st.sampled_from([3, 24]),
    U=st.sampled_from([5, 16]), segments=st.integers(1, 4),
)  # fmt: skip
def test_blockwise_attention_equals_its_reference(L, H, X, U, segments):
    q, k, v = normal(L, 2, L, H, X), normal(L + 1, 2, L, H, X), normal(L + 2, 2, L, H, U)
    segment_BL = jnp.sort(jax.random.randint(jax.random.key(L), (2, L), 0, segments), axis=1)

    def run(which):
        return lambda q, k, v: causal_attention(q, k, v, segment_BL, 0.2, implementation=which)

    assert_same(run("xla"), run("reference"), (q, k, v), (0, 1, 2))


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


@settings(max_examples=10, deadline=None)
@given(T=st.sampled_from([1, 6, 511, 512, 513, 1100]), D=st.sampled_from([4, 17]), V=st.sampled_from([2, 33, 257]))
def test_cross_entropy_equals_its_reference(T, D, V):
    x, w = normal(T, T, D), normal(V, D, V)
    target = jax.random.randint(jax.random.key(1), (T,), 0, V)
    weight = jax.random.bernoulli(jax.random.key(2), 0.8, (T,)) / T

    def run(which):
        return lambda x, w: linear_cross_entropy(x, w, target, weight, implementation=which)[0]

    assert_same(run("auto"), run("reference"), (x, w), (0, 1))
    ours, theirs = (linear_cross_entropy(x, w, target, weight, implementation=i)[1] for i in ("auto", "reference"))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize(
    ("implementation", "T", "D", "V", "dtype"),
    [
        ("tpu", 600, 200, 1100, jnp.float32),
        ("tpu", 2100, 128, 70, jnp.bfloat16),
        ("hopper", 100, 100, 300, jnp.bfloat16),
        ("hopper", 260, 128, 256, jnp.bfloat16),
    ],
)
def test_kernels_of_cross_entropy_equal_its_reference(implementation, T, D, V, dtype):
    """Interpreted, over ragged blocks of tokens, hidden sizes and vocabularies, and a target of another device's columns."""
    interpret = plgpu.InterpretGPUParams() if implementation == "hopper" else True
    x, w = normal(T, T, D, dtype=dtype), normal(V, D, V, dtype=dtype)
    target = jax.random.randint(jax.random.key(1), (T,), 0, V)
    weight = jax.random.bernoulli(jax.random.key(2), 0.8, (T,)) / T

    def run(which, i, **kwargs):
        return lambda x, w: linear_cross_entropy(x, w, target, weight, which, **kwargs)[i]

    # what a kernel hands on is float32 in both: only the gradients, of 8 bits in bfloat16, are rounded anew
    tolerance = F32 if dtype == jnp.float32 else {"rtol": 1e-2, "atol": 1e-2}
    assert_same(run(implementation, 0, interpret=interpret), run("reference", 0), (x, w), (0, 1), tolerance)
    np.testing.assert_allclose(run(implementation, 1, interpret=interpret)(x, w), run("reference", 1)(x, w), rtol=1e-5)

    kernel = {"tpu": logits_tpu, "hopper": logits_hopper}[implementation].logit_statistics
    elsewhere = jnp.full(T, V + 3).at[0].set(-2)
    for ours, theirs in zip(kernel(x, w, elsewhere, False, interpret), logit_statistics(x, w, elsewhere, False), strict=True):
        if theirs is not None:
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("kernel", "arguments"), [(grouped_swiglu, 5), (causal_attention, 5), (linear_cross_entropy, 4)])
def test_an_unknown_implementation_is_an_error(kernel, arguments):
    with pytest.raises((KeyError, ValueError), match="fastest"):
        kernel(*[jnp.zeros((2, 2))] * arguments, implementation="fastest")


@pytest.mark.parametrize(("L", "dtype"), [(256, jnp.float32), (256, jnp.bfloat16), (300, jnp.float32)])
def test_splash_attention_equals_the_reference(L, dtype):
    """JAX's TPU kernel, interpreted, with MLA's unequal sizes of keys and values, and segments; forward and gradients."""
    B, H, X, U = 2, 2, 48, 32
    q, k, v = (normal(i, B, L, H, size, dtype=dtype) for i, size in enumerate((X, X, U)))
    segment = jnp.stack([jnp.arange(L) // 100, jnp.zeros(L, jnp.int32)])

    def run(implementation, **kwargs):
        return lambda q, k, v: causal_attention(q, k, v, segment, 0.2, implementation, **kwargs)

    tolerance = F32 if dtype == jnp.float32 else {"rtol": 3e-2, "atol": 3e-2}  # bfloat16 has 8 bits, and rounds probabilities
    assert_same(run("tpu", interpret=True), run("reference"), (q, k, v), (0, 1, 2), tolerance)


@pytest.mark.parametrize(("L", "X", "U"), [(128, 192, 128), (200, 72, 40)])
def test_hopper_attention_equals_the_reference(L, X, U):
    """Interpreted, with the released model's head sizes and odd ones; queries of one block see several blocks of keys."""
    q, k, v = (normal(i, 1, L, 2, size, dtype=jnp.bfloat16) for i, size in enumerate((X, X, U)))
    segment = (jnp.arange(L) // 90)[None]

    def run(implementation, **kwargs):
        return lambda q, k, v: causal_attention(q, k, v, segment, X**-0.5, implementation, **kwargs)

    # bfloat16 has 8 bits, and rounds probabilities and their gradients
    tolerance = {"rtol": 2e-2, "atol": 2e-2}
    assert_same(run("hopper", interpret=plgpu.InterpretGPUParams()), run("reference"), (q, k, v), (0, 1, 2), tolerance)
    with pytest.raises(NotImplementedError, match="bfloat16, not float32"):
        causal_attention(q.astype(jnp.float32), k, v, segment, 0.2, "hopper")
