"""Quantisation and the products of 8-bit operands: definitions against numpy, kernels (interpreted) against definitions."""

import functools
import importlib
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import grouped_swiglu, register
from pallas_kernels.quantize.api import quantize, quantize_transposed
from pallas_kernels.quantize.reference import rounded
from pallas_kernels.scaled import DTYPES, LARGEST, Gemms, Scaled, dequantize
from pallas_kernels.scaled_linear.api import scaled_linear
from pallas_kernels.scaled_matmul.api import grouped_scaled_matmul, grouped_scaled_wgrad, scaled_matmul
from pallas_kernels.swiglu_quantize.api import swiglu_backward, swiglu_quantize

INTERPRET = {"tpu": True, "hopper": plgpu.InterpretGPUParams()}
SHAPES = [(256, 512), (100, 130), (3, 40), (129, 7168 // 8)]  # whole tiles, edges on both sides, less than one tile
FORMATS = ["e4m3", "e5m2", "int8"]


def normal(seed: int, *shape: int, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def numpy_rounded(x: np.ndarray, rows: int, format: str, power_of_two: bool = False) -> np.ndarray:
    """Tile by tile, in numpy with ml_dtypes' conversions."""
    out = np.zeros_like(x)
    dtype = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}.get(format)
    for i in range(0, x.shape[0], rows):
        for k in range(0, x.shape[1], 128):
            tile = x[i : i + rows, k : k + 128]
            scale = np.float32(max(np.abs(tile).max(), 1e-30)) * np.float32(1 / LARGEST[format])
            scale = np.float32(2.0 ** np.ceil(np.log2(scale))) if power_of_two else scale
            scaled = tile * (np.float32(1) / scale)
            scaled = np.clip(scaled, -LARGEST[format], LARGEST[format])
            out[i : i + rows, k : k + 128] = (
                np.round(scaled) if dtype is None else scaled.astype(dtype).astype(np.float32)
            ) * scale
    return out


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [1, 128])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_quantisation_is_what_numpy_makes_of_every_tile(format, rows, power_of_two):
    for shape in SHAPES:
        x = normal(1, *shape).at[0].set(0)
        expected = numpy_rounded(np.asarray(x), rows, format, power_of_two)
        found = quantize(x, rows, format, power_of_two)
        assert found.values.dtype == DTYPES[format]
        assert found.scales.shape == (-(-shape[1] // 128), -(-shape[0] // rows))
        np.testing.assert_array_equal(dequantize(found), expected)
        np.testing.assert_array_equal(rounded(x, rows, format, power_of_two), expected)


@settings(max_examples=30, deadline=None)
@given(
    exponent=st.integers(-60, 60), format=st.sampled_from(FORMATS), rows=st.sampled_from([1, 128]), seed=st.integers(0, 99),
    power_of_two=st.booleans(),
)  # fmt: skip
def test_quantisation_errs_by_half_a_step(exponent, format, rows, seed, power_of_two):
    """Whatever the magnitude: half the format's relative step, or of its smallest number times the tile's scale."""
    x = normal(seed, 40, 200) * 2.0**exponent
    q = quantize(x, rows, format, power_of_two)
    scale = np.repeat(np.asarray(q.row_scales()).T, 128, axis=1)[:, :200]
    relative = {"e4m3": 2.0**-4, "e5m2": 2.0**-3, "int8": 0.0}[format]
    smallest = {"e4m3": 2.0**-9, "e5m2": 2.0**-16, "int8": 1.0}[format]
    bound = np.maximum(relative * np.abs(x), 0.5 * smallest * scale) * (1 + 1e-5)
    assert (np.abs(np.asarray(dequantize(q)) - x) <= bound).all()
    if power_of_two:
        assert (np.frexp(np.asarray(q.scales))[0] == 0.5).all()


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_what_is_not_finite_stays_so(format):
    x = normal(0, 4, 256).at[1, 3].set(jnp.inf).at[2, 200].set(jnp.nan)
    found = np.isfinite(np.asarray(dequantize(quantize(x, 1, format))))
    assert not found[1, 3]
    assert not found[2, 200]
    assert found[[0, 3]].all()


@pytest.mark.parametrize("implementation", ["tpu", "hopper"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [1, 128])
def test_quantising_kernels_equal_the_definition_exactly(implementation, format, rows):
    for shape, power_of_two in zip(SHAPES, (False, True, False, True), strict=True):
        x = normal(2, *shape, dtype=jnp.bfloat16)
        ours = quantize(x, rows, format, power_of_two, implementation, INTERPRET[implementation])
        theirs = quantize(x, rows, format, power_of_two, "reference")
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize("implementation", ["reference", "tpu", "hopper"])
@pytest.mark.parametrize("format", FORMATS)
def test_transposed_quantisation_equals_numpy(implementation, format):
    """From 16 bits, from 32, and from 8 bits, whose scales change from one axis to the other; int8's from e4m3 too."""
    for shape, power_of_two in zip(SHAPES, (False, True, False, True), strict=True):
        x = normal(2, *shape, dtype=jnp.bfloat16)
        for source in (x, x.astype(jnp.float32) / 3, quantize(x, 1, format), quantize(x, 1, "e4m3", True)):
            found = quantize_transposed(source, format, power_of_two, implementation, INTERPRET.get(implementation))
            numbers = dequantize(source) if isinstance(source, Scaled) else source.astype(jnp.float32)
            np.testing.assert_array_equal(dequantize(found), numpy_rounded(np.asarray(numbers).T, 1, format, power_of_two))
            assert found.values.dtype == DTYPES[format]


def operands(M: int, N: int, K: int, rows: int, format: str) -> tuple[Scaled, Scaled]:
    return quantize(normal(3, M, K), 1, format), quantize(normal(4, N, K), rows, format)


@pytest.mark.parametrize("implementation", ["tpu", "hopper"])
@pytest.mark.parametrize("rows", [1, 128])
@pytest.mark.parametrize(("M", "N", "K"), [(256, 128, 384), (100, 70, 130), (3, 200, 40)])
def test_products_equal_the_definition(implementation, rows, M, N, K):
    """float32 sums in another order, of up to 384 terms; a result in bfloat16 has 8 bits."""
    a, b = operands(M, N, K, rows, "e4m3")
    expected = np.asarray(dequantize(a), np.float64) @ np.asarray(dequantize(b), np.float64).T
    largest = np.abs(expected).max()
    np.testing.assert_allclose(scaled_matmul(a, b) / largest, expected / largest, atol=2e-6)
    for dtype, tolerance in ((jnp.float32, 2e-6), (jnp.bfloat16, 4e-3)):
        ours = scaled_matmul(a, b, jnp.dtype(dtype), implementation, INTERPRET[implementation])
        assert ours.dtype == dtype
        np.testing.assert_allclose(np.asarray(ours, np.float32) / largest, expected / largest, atol=tolerance)
    # the check can fail: scales that belong to other tiles
    wrong = Scaled(a.values, jnp.roll(a.scales, 1, axis=1) * 1.5)
    assert (
        np.abs(scaled_matmul(wrong, b, jnp.dtype("float32"), implementation, INTERPRET[implementation]) - expected).max() > 0.1
    )


@pytest.mark.parametrize("implementation", ["reference", "tpu", "hopper"])
@pytest.mark.parametrize("groups", [[2, 0, 2], [1]])
def test_grouped_products_are_each_groups_own(implementation, groups):
    """Groups in any order, with several blocks or none; each block against a product of its own."""
    N, K, E = 256, 130, 3
    a, w = quantize(normal(3, 128 * len(groups), K), 1), normal(4, E, N, K)
    b = jax.vmap(lambda w: quantize(w, 128, implementation="reference"))(w)
    b = Scaled(b.values.reshape(E * N, K), jnp.moveaxis(b.scales, 0, 1).reshape(b.scales.shape[1], -1))
    ours = grouped_scaled_matmul(
        a, b, jnp.array(groups, jnp.int32), N, implementation=implementation, interpret=INTERPRET.get(implementation)
    )
    for block, group in enumerate(groups):
        rows = slice(block * 128, (block + 1) * 128)
        mine = Scaled(a.values[rows], a.scales[:, rows])
        expected = scaled_matmul(mine, quantize(w[group], 128, implementation="reference"), implementation="reference")
        np.testing.assert_allclose(ours[rows], expected, atol=2e-6 * np.abs(expected).max())


def test_int8_products():
    a, b = operands(100, 70, 130, 128, "int8")
    expected = scaled_matmul(a, b, implementation="reference")
    np.testing.assert_allclose(scaled_matmul(a, b, implementation="tpu", interpret=True), expected, atol=1e-4)
    with pytest.raises(NotImplementedError, match="int8"):
        scaled_matmul(a, b, implementation="hopper")


@pytest.mark.parametrize(
    "gemms", [Gemms(), Gemms(power_of_two=True), Gemms("e4m3", "e5m2", "e5m2"), Gemms("int8", "int8", "int8")]
)
@pytest.mark.parametrize(("T", "K", "N"), [(256, 128, 384), (150, 200, 72)])
def test_all_three_products_of_a_linear_layer(gemms, T, K, N):
    """Against numpy: which operand is rounded in which tiles, in which product."""
    x, w, dy = (np.asarray(normal(5 + i, *shape)) for i, shape in enumerate(((T, K), (K, N), (T, N))))
    y, vjp = jax.vjp(lambda x, w: scaled_linear(x, w, gemms), x, w)
    dx, dw = vjp(jnp.asarray(dy))

    def r(a, rows, product):
        return numpy_rounded(a, rows, getattr(gemms, product), gemms.power_of_two)

    expected_y = r(x, 1, "forward") @ r(w, 128, "forward")
    expected_dx = r(dy, 1, "dgrad") @ r(w, 128, "dgrad").T
    expected_dw = r(r(x, 1, "forward").T.copy(), 1, "wgrad") @ r(dy.T.copy(), 1, "wgrad").T
    for ours, expected in ((y, expected_y), (dx, expected_dx), (dw, expected_dw)):
        np.testing.assert_allclose(ours, expected, atol=3e-6 * np.abs(expected).max())
    for ours, exact in ((y, x @ w), (dx, dy @ w.T), (dw, x.T @ dy)):
        error = np.linalg.norm(ours - exact) / np.linalg.norm(exact)
        assert error < (0.12 if "e5m2" in (gemms.dgrad, gemms.wgrad) else 0.06)  # two operands of 2-3% (e5m2: 5-6%) each


def test_blocks_withstand_outliers_that_one_scale_for_all_does_not():
    """An activation channel a million times larger: tiles lose 128 of 1024 channels, one scale all but this one."""
    x, w = normal(8, 64, 1024).at[:, 5].multiply(1e6), normal(9, 1024, 32).at[5].set(0)
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)

    def error(gemms):
        return np.linalg.norm(scaled_linear(x, w, gemms) - exact) / np.linalg.norm(exact)

    assert error(Gemms()) < 0.5
    assert error(Gemms(per_tensor=True)) > 0.9


def _interpreted(name: str) -> str:
    """The kernels of one platform, interpreted, as an implementation that a recipe can name."""
    for operation in (
        "quantize",
        "quantize_transposed",
        "swiglu_quantize",
        "swiglu_backward",
        "grouped_scaled_matmul",
        "grouped_scaled_wgrad",
    ):
        folder = {
            "quantize": "quantize",
            "quantize_transposed": "quantize",
            "swiglu_quantize": "swiglu_quantize",
            "swiglu_backward": "swiglu_quantize",
        }
        kernels = importlib.import_module(f"pallas_kernels.{folder.get(operation, 'scaled_matmul')}.{name}")
        register(operation, f"{name}_interpreted", functools.partial(getattr(kernels, operation), interpret=INTERPRET[name]))
    return f"{name}_interpreted"


def experts_by_definition(gemms: Gemms, x, w_gate_up, w_down, expert, weight, dy):
    """y and the gradients of x, both weights and the routing weights, expert by expert, in which every operand is rounded."""
    E, D, _, M = w_gate_up.shape

    def r(a, rows, product):
        return np.asarray(rounded(jnp.asarray(a), rows, getattr(gemms, product), gemms.power_of_two), np.float64)

    y, dx, dweight = np.zeros_like(x, np.float64), np.zeros_like(x, np.float64), np.zeros(weight.shape)
    dw_gate_up, dw_down = np.zeros((E, D, 2 * M)), np.zeros((E, M, D))
    x8, dy8 = r(x, 1, "forward"), r(dy, 1, "dgrad")
    for e in range(E):
        token, choice = np.nonzero(np.asarray(expert) == e)
        if not token.size:
            continue
        g, w1 = np.asarray(weight)[token, choice][:, None], np.asarray(w_gate_up[e]).reshape(D, 2 * M)
        gate_up = x8[token] @ r(w1, 128, "forward")
        gate, up = np.split(gate_up, 2, axis=1)
        y[token] += (r(gate / (1 + np.exp(-gate)) * up, 1, "forward") * g) @ r(w_down[e], 128, "forward")

        gate, up = np.split(r(gate_up, 1, "forward"), 2, axis=1)  # what was kept
        sigmoid = 1 / (1 + np.exp(-gate))
        dh = dy8[token] @ r(w_down[e], 128, "dgrad").T
        dweight[token, choice] = (dh * gate * sigmoid * up).sum(1)
        dh = dh * g
        dgate_up = np.concatenate([dh * up * sigmoid * (1 + gate * (1 - sigmoid)), dh * gate * sigmoid], axis=1)
        dx[token] += r(dgate_up, 1, "dgrad") @ r(w1, 128, "dgrad").T
        dw_gate_up[e] = r(x8[token].T, 1, "wgrad") @ r(dgate_up.T, 1, "wgrad").T
        dw_down[e] = r((gate * sigmoid * up).T, 1, "wgrad") @ r((np.asarray(dy)[token] * g).T, 1, "wgrad").T
    return y, dx, dw_gate_up.reshape(w_gate_up.shape), dw_down, dweight


@pytest.mark.parametrize("implementation", ["auto", "tpu", "hopper"])
@pytest.mark.parametrize("gemms", [Gemms(), Gemms("e4m3", "e5m2", "e5m2"), Gemms("int8", "int8", "int8")])
def test_experts_round_every_operand_as_the_definition_does(gemms, implementation):
    """Tokens of an expert fill one tile; expert 3 has none; a token's second choice may be nobody. D is no multiple of 128."""
    if implementation != "auto":
        if implementation == "hopper" and gemms.forward == "int8":
            pytest.skip("no kernel: Mosaic GPU has no int8 products")
        gemms = replace(gemms, implementation=_interpreted(implementation))
    T, D, M, E, K = 20, 130, 128, 4, 2
    x, w_gate_up, w_down = normal(0, T, D), normal(1, E, D, 2, M) * 0.1, normal(2, E, M, D) * 0.1
    expert = (jnp.arange(T)[:, None] + jnp.arange(K)) % (E - 1)
    expert = expert.at[5, 1].set(E)
    weight, dy = jax.random.uniform(jax.random.key(4), (T, K), minval=0.1), normal(5, T, D)
    y, vjp = jax.vjp(lambda x, a, b, g: grouped_swiglu(x, a, b, expert, g, gemms), x, w_gate_up, w_down, weight)
    expected = experts_by_definition(gemms, x, w_gate_up, w_down, expert, weight, dy)
    for ours, theirs in zip((y, *vjp(dy)), expected, strict=True):
        # an operand that differs in a last bit may round to its neighbour in 8 bits, which moves a row of 20: most numbers
        # agree, and all nearly do
        difference = np.abs(np.asarray(ours) - theirs) / np.abs(theirs).max()
        assert np.quantile(difference, 0.85) < 1e-5
        assert difference.max() < 0.03


@pytest.mark.parametrize("gemms", [Gemms(), Gemms(power_of_two=True), Gemms(per_tensor=True)])
def test_experts_with_several_tiles_each(gemms):
    """300 tokens of 2 experts: against 16 bits, whose difference is what 8 bits round."""
    T, D, M, E = 300, 128, 128, 2
    args = normal(0, T, D), normal(1, E, D, 2, M) * 0.1, normal(2, E, M, D) * 0.1
    expert, weight, dy = jnp.arange(T)[:, None] % E, jnp.ones((T, 1)), normal(5, T, D)
    y, vjp = jax.vjp(lambda *a: grouped_swiglu(*a, expert, weight, gemms), *args)
    exact, exact_vjp = jax.vjp(lambda *a: grouped_swiglu(*a, expert, weight), *args)
    for ours, theirs in zip((y, *vjp(dy)), (exact, *exact_vjp(dy)), strict=True):
        assert np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 0.1  # four or five operands of 2.6-3% each
        assert not np.array_equal(ours, theirs)


@pytest.mark.parametrize("implementation", ["tpu", "hopper"])
def test_groups_of_the_weights_gradient(implementation):
    """Groups of two blocks, none, and one; a block that is not there counts for nothing."""
    A, B, G = 128, 256, 4
    group = jnp.array([0, 0, 2, 3, 4], jnp.int32)
    a, b = quantize(normal(0, A, 640), 1), quantize(normal(1, B, 640), 1)
    expected = np.zeros((G, A, B))
    for block, g in enumerate(group[:-1]):
        at = slice(block * 128, (block + 1) * 128)
        expected[g] += np.asarray(dequantize(a), np.float64)[:, at] @ np.asarray(dequantize(b), np.float64)[:, at].T
    for found in (
        grouped_scaled_wgrad(a, b, group, G),
        grouped_scaled_wgrad(a, b, group, G, implementation=implementation, interpret=INTERPRET[implementation]),
    ):
        np.testing.assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("implementation", ["tpu", "hopper"])
@pytest.mark.parametrize(("T", "F"), [(256, 256), (100, 128)])
@pytest.mark.parametrize("format", FORMATS)
def test_swiglu_with_quantisation(implementation, T, F, format):
    """Values equal the definition's; scales may differ in the last bit, where a platform's exp does."""
    gate_up, dh = 3 * normal(0, T, 2 * F, dtype=jnp.bfloat16), normal(1, T, F, dtype=jnp.bfloat16)
    weight = jax.random.uniform(jax.random.key(2), (T,))
    theirs = swiglu_quantize(gate_up, format, implementation="reference")
    ours = swiglu_quantize(gate_up, format, implementation=implementation, interpret=INTERPRET[implementation])
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(np.asarray(a.values, np.float32), np.asarray(b.values, np.float32))
        np.testing.assert_allclose(a.scales, b.scales, rtol=3e-7)
    expected = swiglu_backward(theirs[1], dh, weight, "reference")
    found = swiglu_backward(theirs[1], dh, weight, implementation, INTERPRET[implementation])
    for i in range(2):  # bfloat16
        np.testing.assert_allclose(*(np.asarray(d[i], np.float32) for d in (found, expected)), rtol=1e-2, atol=1e-5)
    np.testing.assert_allclose(found[2], expected[2], atol=1e-6 * np.abs(expected[2]).max())  # a sum of F terms

    # the definition's gradient is autodiff's, at what was kept, and h what it is there
    def weighted(kept, weight):
        gate, up = jnp.split(kept, 2, axis=1)
        return weight[:, None] * jax.nn.silu(gate) * up

    _, vjp = jax.vjp(weighted, dequantize(theirs[1]), weight)
    dgate_up, h, dweight = swiglu_backward(theirs[1], dh.astype(jnp.float32), weight)
    autodiff = (*vjp(dh.astype(jnp.float32)), weighted(dequantize(theirs[1]), jnp.ones(T)))
    for a, b in zip((dgate_up, dweight, h), autodiff, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(b).max())
