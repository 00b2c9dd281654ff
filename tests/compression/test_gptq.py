"""GPTQ against the algorithm that it speeds up, grids against a search by hand, experts that nobody reaches."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from dsv3_jax.compression.experts import Moments, add_moments, gptq_experts, no_moments
from dsv3_jax.compression.gptq import SWEEPS, add_products, descend, gptq, loss_of_rounding, round_to_nearest
from dsv3_jax.compression.grid import Grid, choose_grid
from pallas_kernels.integer_weight import IntegerFormat

W4, W2 = IntegerFormat(4, 8), IntegerFormat(2, 8, symmetric=False)
K, N = 24, 6


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def w_KN(rng):
    return rng.normal(size=(K, N)).astype(np.float32)


def moments_of(x_TK) -> np.ndarray:
    return (x_TK.T.astype(np.float64) @ x_TK).astype(np.float32)


@pytest.fixture
def moments_KK(rng):
    mixed = rng.normal(size=(K, K)) * np.exp(rng.normal(size=K))
    return moments_of((rng.normal(size=(100, K)) @ mixed).astype(np.float32))


def dequantised(rounded, format):
    scale_KN, zero_KN = Grid(rounded.scale_GN, rounded.zero_GN).per_input(format.group)
    return np.asarray(scale_KN * (rounded.codes_KN.astype(jnp.float32) - zero_KN))


def optimal_brain_codes(w_KN, moments_KK, format, damping):
    """Equations 2-3 of arXiv 2210.17323, in float64: after each input the inverse of what is left is taken anew."""
    h = moments_KK + damping * np.trace(moments_KK.astype(np.float64)) / len(moments_KK) * np.eye(len(moments_KK))
    grid = choose_grid(jnp.asarray(w_KN), format, jnp.asarray(np.diag(h), jnp.float32))
    scale_KN, zero_KN = (np.asarray(a, np.float64) for a in grid.per_input(format.group))
    order = np.argsort(-np.diag(h), kind="stable")
    w, h = w_KN.astype(np.float64)[order], h[order][:, order]
    codes = np.zeros_like(w)
    for i in range(len(w)):
        s, z = scale_KN[order[i]], zero_KN[order[i]]
        codes[i] = np.clip(np.round(w[i] / s) + z, 0, format.levels - 1)
        inverse = np.linalg.inv(h[i:, i:])
        w[i:] -= np.outer(inverse[:, 0] / inverse[0, 0], w[i] - s * (codes[i] - z))
    codes = codes[np.argsort(order)]
    return codes if format.bits >= 4 else descended(w_KN, codes, grid, h[np.argsort(order)][:, np.argsort(order)], format)


def descended(w_KN, codes, grid, h, format):
    """Codes after the sweeps of `descend`, in float64: scales by least squares, each code by trying all of them."""
    codes, root = codes.copy(), np.linalg.cholesky(h).T
    scale, zero = np.array(grid.scale_GN, np.float64), np.asarray(grid.zero_GN, np.float64)
    group = format.group
    for _, g, n in itertools.product(range(SWEEPS), range(len(scale)), range(w_KN.shape[1])):
        rows = slice(g * group, (g + 1) * group)

        def rounded(codes, n=n):
            return np.repeat(scale[:, n], group) * (codes - np.repeat(zero[:, n], group))

        number = np.zeros(len(w_KN))
        number[rows] = codes[rows, n] - zero[g, n]
        others = rounded(codes[:, n]) - scale[g, n] * number
        if (found := np.linalg.lstsq(root @ number[:, None], root @ (w_KN[:, n] - others))[0][0]) > 2.0**-24:
            scale[g, n] = np.float64(jnp.float16(jnp.bfloat16(jnp.float16(found))))
        for k in range(rows.start, rows.stop):
            tried = np.repeat(codes[:, n][None], format.levels, 0)
            tried[:, k] = range(format.levels)
            codes[k, n] = np.square((rounded(tried) - w_KN[:, n]) @ root.T).sum(1).argmin()
    return codes


@pytest.mark.parametrize("format", [W4, W2, IntegerFormat(8, 24)], ids=str)
def test_codes_are_those_of_optimal_brain_surgery(w_KN, moments_KK, format):
    """K is no multiple of a block of 128, and no order of inputs is that of the moments."""
    found = gptq(jnp.asarray(w_KN), jnp.asarray(moments_KK), format, 0.01)
    assert found.sound
    np.testing.assert_array_equal(found.codes_KN, optimal_brain_codes(w_KN, moments_KK, format, 0.01))


def test_several_blocks_carry_their_errors_over(rng):
    """160 inputs are two blocks of 80; float32 may decide a tie otherwise than float64, so a few codes may differ."""
    w, x = rng.normal(size=(160, 4)).astype(np.float32), rng.normal(size=(400, 160)) @ rng.normal(size=(160, 160))
    found = gptq(jnp.asarray(w), jnp.asarray(moments_of(x)), W4, 0.01)
    assert (np.asarray(found.codes_KN) != optimal_brain_codes(w, moments_of(x), W4, 0.01)).mean() < 0.01


def test_descent_takes_loss_away_and_none_from_what_is_rounded_already(w_KN, moments_KK):
    """A grid of 2 bits, from the nearest codes; a weight that is on its grid stays there."""
    w_KN, moments_KK, start = jnp.asarray(w_KN), jnp.asarray(moments_KK), round_to_nearest(w_KN, W2)
    grid = Grid(start.scale_GN, start.zero_GN)
    codes_KN, found = descend(w_KN, start.codes_KN.astype(jnp.float32), grid, moments_KK, W2)
    on_grid = dequantised(start._replace(codes_KN=codes_KN, scale_GN=found.scale_GN), W2)
    losses = [float(loss_of_rounding(w_KN, jnp.asarray(a), moments_KK)) for a in (on_grid, dequantised(start, W2))]
    assert losses[0] < 0.5 * losses[1]
    again_KN, again = descend(jnp.asarray(on_grid), codes_KN, found, moments_KK, W2)
    np.testing.assert_array_equal(again_KN, codes_KN)
    np.testing.assert_array_equal(again.scale_GN, found.scale_GN)


def test_loses_less_of_the_output_than_rounding(w_KN, moments_KK):
    losses = [
        float(loss_of_rounding(jnp.asarray(w_KN), jnp.asarray(dequantised(found, W4)), jnp.asarray(moments_KK)))
        for found in (gptq(jnp.asarray(w_KN), jnp.asarray(moments_KK), W4, 0.01), round_to_nearest(jnp.asarray(w_KN), W4))
    ]
    assert losses[0] < 0.5 * losses[1]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("format", [W4, W2], ids=str)
def test_the_grid_is_the_best_of_those_tried(w_KN, format, weighted):
    """Every group of every output; errors count as much as the moments of their inputs, if these are given."""
    moment_K = np.linspace(0, 3, K).astype(np.float32) if weighted else np.ones(K, np.float32)
    grid = choose_grid(jnp.asarray(w_KN), format, jnp.asarray(moment_K) if weighted else None)
    assert (grid.scale_GN.astype(jnp.bfloat16).astype(jnp.float16) == grid.scale_GN).all()  # in both formats the same number
    for g, output in np.ndindex(K // 8, N):
        inputs = slice(8 * g, 8 * g + 8)
        group = w_KN[inputs, output].astype(np.float64)
        low, high = min(group.min(), 0), max(group.max(), 0)
        if format.symmetric:
            low, high = -np.abs(group).max(), np.abs(group).max()
        tried = []
        for factor in np.linspace(1.05, 0.5, 23):
            scale = np.float64(jnp.float16(jnp.bfloat16(jnp.float16(factor * (high - low) / (format.levels - 1)))))
            zero = format.middle if format.symmetric else np.clip(np.round(-factor * low / scale), 0, format.levels - 1)
            codes = np.clip(np.round(group / scale) + zero, 0, format.levels - 1)
            tried.append(((moment_K[inputs] * np.abs(group - scale * (codes - zero)) ** 2.4).sum(), scale, zero))
        assert (float(grid.scale_GN[g, output]), int(grid.zero_GN[g, output])) == min(tried)[1:]


def test_a_group_of_zeros_stays_zeros():
    zeros_KN = jnp.zeros((K, N))
    for format in (W4, W2):
        assert not dequantised(round_to_nearest(zeros_KN, format), format).any()
        assert not dequantised(gptq(zeros_KN, jnp.zeros((K, K)), format, 0.01), format).any()


def test_moments_that_cannot_be_factorised_are_not_sound(w_KN):
    assert not gptq(jnp.asarray(w_KN), -jnp.eye(K), W4, 0.01).sound
    assert not gptq(jnp.asarray(w_KN).at[0, 0].set(jnp.nan), jnp.eye(K), W4, 0.01).sound


@pytest.mark.parametrize("rows", [1, 127, 300])
def test_products_are_added_whatever_their_number(rng, rows):
    x_TK = rng.normal(size=(rows, K)).astype(np.float32)
    found = add_products(jnp.ones((K, K)), jnp.asarray(x_TK))
    np.testing.assert_allclose(found, 1 + moments_of(x_TK), rtol=1e-5, atol=1e-4)  # sums of up to 300 float32 numbers


E, M, T = 4, 8, 150


def mesh_of(devices: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:devices]), ("experts",))


@pytest.fixture
def routed(rng):
    """Tokens, their choices (E: none), and gate and up projections; nobody chooses expert 2."""
    expert_TK = np.stack([rng.choice([0, 1, 3], 2, replace=False) for _ in range(T)])
    expert_TK[-5:] = E
    x_TD = rng.normal(size=(T, K)).astype(np.float32)
    return x_TD, expert_TK, rng.normal(size=(E, K, 2, M)).astype(np.float32)


def hidden_of(x_TD, w_D2M):
    gate, up = np.einsum("td,dxm->xtm", x_TD.astype(np.float64), w_D2M)
    return gate / (1 + np.exp(-gate)) * up


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_moments_are_those_of_each_experts_tokens(routed, devices):
    x_TD, expert_TK, w = routed
    mesh = mesh_of(devices)
    for inputs, weights in ((K, None), (M, jnp.asarray(w))):
        found = no_moments(mesh, E, inputs)
        for half in (slice(0, 70), slice(70, T)):  # a batch after another
            found = add_moments(mesh, found, jnp.asarray(x_TD[half]), jnp.asarray(expert_TK[half]), weights)
        for e in range(E):
            own = x_TD[(expert_TK == e).any(1)]
            assert found.tokens_E[e] == len(own)
            read = own if weights is None else hidden_of(own, w[e])
            np.testing.assert_allclose(found.xx_EKK[e], moments_of(read), rtol=1e-4, atol=1e-3)  # float32 sums


@pytest.mark.parametrize("format", [W4, W2], ids=str)
def test_any_number_of_devices_gives_the_same_codes(routed, rng, format):
    x_TD, expert_TK, _ = routed
    w_EKN = rng.normal(size=(E, K, N)).astype(np.float32)

    def codes(devices: int):
        mesh = mesh_of(devices)
        moments = add_moments(mesh, no_moments(mesh, E, K), jnp.asarray(x_TD), jnp.asarray(expert_TK))
        found = gptq_experts(mesh, w_EKN, moments, format, 0.01)
        assert found.sound.all()
        return jax.device_get(found)

    jax.tree.map(np.testing.assert_array_equal, codes(1), codes(2))
    jax.tree.map(np.testing.assert_array_equal, codes(1), codes(4))


def test_an_expert_without_tokens_gets_the_layers_mean(routed, rng):
    x_TD, expert_TK, _ = routed
    mesh = mesh_of(2)
    w_EKN = rng.normal(size=(E, K, N)).astype(np.float32)
    moments = add_moments(mesh, no_moments(mesh, E, K), jnp.asarray(x_TD), jnp.asarray(expert_TK))
    mean_KK = np.asarray(moments.xx_EKK).sum(0) / np.asarray(moments.tokens_E).sum()
    found = gptq_experts(mesh, w_EKN, moments, W4, 0.01)
    for e, own in ((2, 0), (1, np.asarray(moments.xx_EKK)[1])):
        expected = gptq(jnp.asarray(w_EKN[e]), jnp.asarray(own + K * mean_KK), W4, 0.01)
        np.testing.assert_array_equal(found.codes_KN[e], expected.codes_KN)


def test_no_tokens_at_all_is_rounding(rng):
    w_EKN = rng.normal(size=(E, K, N)).astype(np.float32)
    mesh = mesh_of(1)
    found = gptq_experts(mesh, w_EKN, Moments(*no_moments(mesh, E, K)), W4, 0.01)
    assert found.sound.all()
    np.testing.assert_array_equal(found.codes_KN[1], round_to_nearest(jnp.asarray(w_EKN[1]), W4).codes_KN)
