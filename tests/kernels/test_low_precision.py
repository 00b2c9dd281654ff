"""Quantisation and what is made of it: definitions against NumPy. `test_suites` holds the kernels to the definitions."""

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
from pallas_kernels.measure import normal
from pallas_kernels.quantize.api import quantize, quantize_transposed
from pallas_kernels.quantize.cases import SHAPES, sources
from pallas_kernels.quantize.reference import rounded
from pallas_kernels.scaled import DTYPES, LARGEST, Gemms, Scaled, dequantize
from pallas_kernels.scaled_linear.api import scaled_linear
from pallas_kernels.swiglu_quantize.api import swiglu_backward, swiglu_quantize
from pallas_kernels.swiglu_quantize.cases import gate_up

INTERPRET = {"tpu": True, "hopper": plgpu.InterpretGPUParams()}
FORMATS = ["e4m3", "e5m2", "int8"]


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def quantized(x, rows: int, format: str, power_of_two: bool):
    """(in 8 bits, what that stands for, the same without the detour)."""
    found = quantize(x, rows, format, power_of_two)
    return found, dequantize(found), rounded(x, rows, format, power_of_two)


@functools.partial(jax.jit, static_argnums=(1, 2))
def transposed(source, format: str, power_of_two: bool):
    """(in 8 bits, the numbers of the source, what the result stands for)."""
    found = quantize_transposed(source, format, power_of_two)
    return found, dequantize(source) if isinstance(source, Scaled) else source.astype(jnp.float32), dequantize(found)


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
        found, numbers, again = quantized(x, rows, format, power_of_two)
        assert found.values.dtype == DTYPES[format]
        assert found.scales.shape == (-(-shape[1] // 128), -(-shape[0] // rows))
        np.testing.assert_array_equal(numbers, expected)
        np.testing.assert_array_equal(again, expected)


@settings(max_examples=30, deadline=None)
@given(
    exponent=st.integers(-60, 60), format=st.sampled_from(FORMATS), rows=st.sampled_from([1, 128]), seed=st.integers(0, 99),
    power_of_two=st.booleans(),
)  # fmt: skip
def test_quantisation_errs_by_half_a_step(exponent, format, rows, seed, power_of_two):
    """Whatever the magnitude: half the format's relative step, or of its smallest number times the tile's scale."""
    x = normal(seed, 40, 200) * 2.0**exponent
    q, numbers, _ = quantized(x, rows, format, power_of_two)
    scale = np.repeat(np.asarray(q.row_scales()).T, 128, axis=1)[:, :200]
    relative = {"e4m3": 2.0**-4, "e5m2": 2.0**-3, "int8": 0.0}[format]
    smallest = {"e4m3": 2.0**-9, "e5m2": 2.0**-16, "int8": 1.0}[format]
    bound = np.maximum(relative * np.abs(x), 0.5 * smallest * scale) * (1 + 1e-5)
    assert (np.abs(np.asarray(numbers) - x) <= bound).all()
    if power_of_two:
        assert (np.frexp(np.asarray(q.scales))[0] == 0.5).all()


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_what_is_not_finite_stays_so(format):
    x = normal(0, 4, 256).at[1, 3].set(jnp.inf).at[2, 200].set(jnp.nan)
    found = np.isfinite(np.asarray(quantized(x, 1, format, False)[1]))
    assert not found[1, 3]
    assert not found[2, 200]
    assert found[[0, 3]].all()


@pytest.mark.parametrize("format", FORMATS)
def test_transposed_quantisation_equals_numpy(format):
    """From 16 bits, from 32, and from 8 bits, whose scales change from one axis to the other; int8's from e4m3 too."""
    for shape, power_of_two in SHAPES.items():
        for source in sources(shape, format).values():
            found, numbers, made = transposed(source, format, power_of_two)
            np.testing.assert_array_equal(made, numpy_rounded(np.asarray(numbers).T, 1, format, power_of_two))
            assert found.values.dtype == DTYPES[format]


def values_and_gradients(function, arguments: tuple, dy):
    """Compiled as one program: op by op, a test would compile a hundred."""

    def run(arguments, dy):
        y, vjp = jax.vjp(function, *arguments)
        return y, vjp(dy)

    return jax.jit(run)(arguments, dy)


@pytest.mark.parametrize(
    "gemms", [Gemms(), Gemms(power_of_two=True), Gemms("e4m3", "e5m2", "e5m2"), Gemms("int8", "int8", "int8")]
)
@pytest.mark.parametrize(("T", "K", "N"), [(256, 128, 384), (150, 200, 72)])
def test_all_three_products_of_a_linear_layer(gemms, T, K, N):
    """Against numpy: which operand is rounded in which tiles, in which product."""
    x, w, dy = (np.asarray(normal(5 + i, *shape)) for i, shape in enumerate(((T, K), (K, N), (T, N))))
    y, (dx, dw) = values_and_gradients(lambda x, w: scaled_linear(x, w, gemms), (x, w), dy)

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
        return np.linalg.norm(jax.jit(scaled_linear, static_argnums=2)(x, w, gemms) - exact) / np.linalg.norm(exact)

    assert error(Gemms()) < 0.5
    assert error(Gemms(per_tensor=True)) > 0.9


def _interpreted(name: str) -> str:
    """The kernels of one platform, interpreted, as an implementation that a recipe can name."""
    folders = {"quantize": ("quantize", "quantize_transposed"), "swiglu_quantize": ("swiglu_quantize", "swiglu_backward")}
    folders["scaled_matmul"] = ("grouped_scaled_matmul", "grouped_scaled_wgrad")
    for folder, operations in folders.items():
        kernels = importlib.import_module(f"pallas_kernels.{folder}.{name}")
        for operation in operations:
            interpreted = functools.partial(getattr(kernels, operation), interpret=INTERPRET[name])
            register(operation, f"{name}_interpreted", interpreted)
    return f"{name}_interpreted"


def experts_by_definition(gemms: Gemms, x, w_gate_up, w_down, expert, weight, dy):
    """y and the gradients of x, both weights and the routing weights, expert by expert, in which every operand is rounded."""
    E, D, _, M = w_gate_up.shape

    def r(a, rows, product):
        return np.float64(numpy_rounded(np.asarray(a, np.float32), rows, getattr(gemms, product), gemms.power_of_two))

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
@pytest.mark.parametrize(
    "gemms",
    [Gemms(), pytest.param(Gemms("e4m3", "e5m2", "e5m2"), marks=pytest.mark.slow), Gemms("int8", "int8", "int8")],
)
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
    arguments = x, w_gate_up, w_down, weight
    y, gradients = values_and_gradients(lambda x, a, b, g: grouped_swiglu(x, a, b, expert, g, gemms), arguments, dy)
    expected = experts_by_definition(gemms, x, w_gate_up, w_down, expert, weight, dy)
    for ours, theirs in zip((y, *gradients), expected, strict=True):
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
    y, gradients = values_and_gradients(lambda *a: grouped_swiglu(*a, expert, weight, gemms), args, dy)
    exact, exact_gradients = values_and_gradients(lambda *a: grouped_swiglu(*a, expert, weight), args, dy)
    for ours, theirs in zip((y, *gradients), (exact, *exact_gradients), strict=True):
        assert np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 0.1  # four or five operands of 2.6-3% each
        assert not np.array_equal(ours, theirs)


@pytest.mark.parametrize(("T", "F"), [(256, 256), (100, 128)])
@pytest.mark.parametrize("format", FORMATS)
def test_the_gradient_of_swiglu_is_autodiffs(T, F, format):
    """At what was kept; and h is what it is there."""
    dh, weight = normal(1, T, F), jax.random.uniform(jax.random.key(2), (T,))

    def weighted(kept, weight):
        gate, up = jnp.split(kept, 2, axis=1)
        return weight[:, None] * jax.nn.silu(gate) * up

    @jax.jit
    def both(gate_up, dh, weight):
        kept = swiglu_quantize(gate_up, format)[1]
        dkept, dweight = jax.vjp(weighted, dequantize(kept), weight)[1](dh)
        return swiglu_backward(kept, dh, weight), (dkept, weighted(dequantize(kept), jnp.ones(T)), dweight)

    for a, b in zip(*both(gate_up(T, F), dh, weight), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(b).max())
