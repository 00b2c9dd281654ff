"""GPTQ (arXiv 2210.17323): rounds a weight input by input, and lets the inputs that are left make up for each error.

A linear layer y = x w with the inputs' second moments H = sum x^T x loses tr(dw^T H dw) by rounding. Rounding input j with an
error e is best made up for by moving the weights of the inputs after it by -U[j, j+1:] e / U[j, j], where H^-1 = U^T U with U
upper triangular. Inputs with the largest moments come first, while most others can still make up for them; scales are those of
the original order, fixed before ("static"), so that no client has to know the order. In 2 bits, coordinate descent goes on
from there, over codes and scales.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float16, Float32, UInt8

from dsv3_jax.compression.grid import SMALLEST_SCALE, Grid, choose_grid, nearest_code
from pallas_kernels.integer_weight import IntegerFormat, storable
from pallas_kernels.products import dot

_BLOCK = 128  # inputs whose errors are collected before they are carried over to the inputs after the block
SWEEPS = 4  # over all groups: eight lose 1% less


class Rounded(NamedTuple):
    """Codes of a weight [K, N], one each, and their grid. `sound`: the factorisation of H succeeded; without, they are void."""

    codes_KN: UInt8[Array, "*lead K N"]
    scale_GN: Float16[Array, "*lead G N"]
    zero_GN: UInt8[Array, "*lead G N"]
    sound: Bool[Array, "*lead"]


def add_products(xx_KK: Float32[Array, "K K"], x_TK: Float32[Array, "T K"]) -> Float32[Array, "K K"]:
    """Moments with x^T x, summed over few rows at a time, in order.

    One product over all rows would be cut along them into as many partial sums as a CPU has threads, and other bits of a sum
    here and there give another code.
    """
    T, K = x_TK.shape
    rows = max(128, K // 4)
    x_bRK = jnp.pad(x_TK, ((0, -T % rows), (0, 0))).reshape(-1, rows, K)
    return jax.lax.scan(lambda xx_KK, x_RK: (xx_KK + dot(x_RK.T, x_RK), None), xx_KK, x_bRK)[0]


def damped(moments_KK: Float32[Array, "K K"], damping: float | Array) -> Float32[Array, "K K"]:
    """The moments with `damping` times their mean diagonal added to it; the unit matrix for those of no tokens."""
    K = moments_KK.shape[0]
    mean = jnp.trace(moments_KK) / K
    return moments_KK + jnp.where(mean > 0, damping * mean, 1.0) * jnp.eye(K, dtype=jnp.float32)


def inverse_factor(moments_KK: Float32[Array, "K K"]) -> Float32[Array, "K K"]:
    """U, upper triangular, with U^T U the inverse of the moments.

    H = R R^T with R upper triangular is a Cholesky factorisation with rows and columns reversed; then U = R^-1.
    """
    lower_KK = jnp.linalg.cholesky(moments_KK[::-1, ::-1])
    unit_KK = jnp.eye(len(moments_KK), dtype=jnp.float32)
    return jax.scipy.linalg.solve_triangular(lower_KK[::-1, ::-1], unit_KK, lower=False)


def descends(format: IntegerFormat) -> bool:
    """Whether GPTQ's codes are improved by `descend`: 2 bits lose a quarter less by it, 4 bits a tenth: not worth it."""
    return format.bits < 4


def block_of(inputs: int) -> int:
    """How many inputs are rounded before their errors are carried over to those after them: a divisor."""
    return max(b for b in range(1, min(inputs, _BLOCK) + 1) if inputs % b == 0)


def _round_in_order(w_KN: Array, grid: Grid, u_KK: Array, format: IntegerFormat, order_K: Array) -> Float32[Array, "K N"]:
    """Codes, in the original order, of a weight whose inputs are rounded in `order_K`, which is that of `u_KK`."""
    K, N = w_KN.shape
    block = block_of(K)
    scale_KN, zero_KN = (a[order_K] for a in grid.per_input(format.group))

    def round_block(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        w_KN, codes_KN = carry
        begin = i * block
        rows_BK = jax.lax.dynamic_slice_in_dim(u_KK, begin, block)
        rows_BB = jax.lax.dynamic_slice_in_dim(rows_BK, begin, block, 1)
        s_BN, z_BN = (jax.lax.dynamic_slice_in_dim(a, begin, block) for a in (scale_KN, zero_KN))

        def round_input(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            w_BN, codes_BN, errors_BN = carry
            code_N = nearest_code(w_BN[j], s_BN[j], z_BN[j], format.levels)
            error_N = (w_BN[j] - s_BN[j] * (code_N - z_BN[j])) / rows_BB[j, j]
            w_BN -= rows_BB[j][:, None] * error_N  # of those before j nothing: U is upper triangular
            return w_BN, codes_BN.at[j].set(code_N), errors_BN.at[j].set(error_N)

        w_BN = jax.lax.dynamic_slice_in_dim(w_KN, begin, block)
        empty_BN = jnp.zeros((block, N), jnp.float32)
        _, codes_BN, errors_BN = jax.lax.fori_loop(0, block, round_input, (w_BN, empty_BN, empty_BN))
        w_KN -= dot(rows_BK.T, errors_BN)
        return w_KN, jax.lax.dynamic_update_slice_in_dim(codes_KN, codes_BN, begin, 0)

    carry = w_KN[order_K], jnp.zeros((K, N), jnp.float32)
    _, codes_KN = jax.lax.fori_loop(0, K // block, round_block, carry)
    return codes_KN[jnp.argsort(order_K)]


def descend(
    w_KN: Float32[Array, "K N"], codes_KN: Float32[Array, "K N"], grid: Grid, moments_KK: Float32[Array, "K K"],
    format: IntegerFormat,
) -> tuple[Float32[Array, "K N"], Grid]:  # fmt: skip
    """Codes and scales that lose less than these, by coordinate descent on tr(dw^T H dw), dw = rounded - w.

    A group at a time: the scale that is the best for its codes, then each code that is the best for all the others. GPTQ
    decides over an input once, before those after it are rounded, and its scales know of the moments' diagonal alone.
    """
    group, groups = format.group, len(grid.scale_GN)
    scale_KN, zero_KN = grid.per_input(group)

    def of_group(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        codes_KN, scale_GN, slope_KN = carry  # slope: H dw
        g = i % groups
        old_gN, slope_gN, zero_gN = (jax.lax.dynamic_slice_in_dim(a, g * group, group) for a in (codes_KN, slope_KN, zero_KN))
        h_Kg = jax.lax.dynamic_slice_in_dim(moments_KK, g * group, group, 1)
        h_gg = jax.lax.dynamic_slice_in_dim(h_Kg, g * group, group)
        number_gN, old_N = old_gN - zero_gN, scale_GN[g]  # dw's part is old * number - w
        curvature_N = jnp.sum(number_gN * dot(h_gg, number_gN), 0)
        best_N = old_N - jnp.sum(number_gN * slope_gN, 0) / jnp.where(curvature_N > 0, curvature_N, 1)
        scale_N = jnp.where(best_N > SMALLEST_SCALE, storable(best_N).astype(jnp.float32), old_N)

        def of_input(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            codes_gN, slope_gN = carry
            wanted_N = scale_N * (codes_gN[j] - zero_gN[j]) - slope_gN[j] / h_gg[j, j]
            code_N = nearest_code(wanted_N, scale_N, zero_gN[j], format.levels)
            slope_gN += h_gg[:, j, None] * (scale_N * (code_N - codes_gN[j]))
            return codes_gN.at[j].set(code_N), slope_gN

        slope_gN += dot(h_gg, (scale_N - old_N) * number_gN)
        codes_gN, _ = jax.lax.fori_loop(0, group, of_input, (old_gN, slope_gN))
        slope_KN += dot(h_Kg, scale_N * (codes_gN - zero_gN) - old_N * number_gN)
        return jax.lax.dynamic_update_slice_in_dim(codes_KN, codes_gN, g * group, 0), scale_GN.at[g].set(scale_N), slope_KN

    slope_KN = dot(moments_KK, scale_KN * (codes_KN - zero_KN) - w_KN)
    carry = codes_KN, grid.scale_GN.astype(jnp.float32), slope_KN
    codes_KN, scale_GN, _ = jax.lax.fori_loop(0, SWEEPS * groups, of_group, carry)
    return codes_KN, grid._replace(scale_GN=scale_GN.astype(jnp.float16))


def round_to_nearest(w_KN: Float32[Array, "K N"], format: IntegerFormat) -> Rounded:
    """Every weight to the nearest number of its group's grid, without a look at inputs: what GPTQ is compared with."""
    grid = choose_grid(w_KN, format)
    codes_KN = nearest_code(w_KN, *grid.per_input(format.group), format.levels)
    return Rounded(codes_KN.astype(jnp.uint8), *grid, jnp.bool_(True))


def gptq(
    w_KN: Float32[Array, "K N"], moments_KK: Float32[Array, "K K"], format: IntegerFormat, damping: float | Array
) -> Rounded:
    """The codes of a weight whose inputs have these second moments.

    Args:
        w_KN: f32[K, N], inputs first.
        moments_KK: f32[K, K], the sum of x^T x over the inputs x of the calibration set.
        format: Its group divides K.
        damping: Is added to the diagonal, in units of its mean.
    """
    moments_KK = damped(moments_KK, damping)
    grid = choose_grid(w_KN, format, jnp.diagonal(moments_KK))
    order_K = jnp.argsort(-jnp.diagonal(moments_KK), stable=True)
    u_KK = inverse_factor(moments_KK[order_K][:, order_K])
    codes_KN = _round_in_order(w_KN, grid, u_KK, format, order_K)
    if descends(format):
        codes_KN, grid = descend(w_KN, codes_KN, grid, moments_KK, format)
    return Rounded(codes_KN.astype(jnp.uint8), *grid, jnp.isfinite(u_KK).all() & jnp.isfinite(codes_KN).all())


def _energy(w_KN: Array, moments_KK: Array) -> Float32[Array, ""]:
    """tr(w^T H w): the squared outputs x w, summed over the inputs x whose second moments are H."""
    return jnp.sum(w_KN * dot(moments_KK, w_KN))


def loss_of_rounding(w_KN: Array, dequantised_KN: Array, moments_KK: Array) -> Float32[Array, ""]:
    """tr(dw^T H dw) / tr(w^T H w): how much of the layer's output, squared, rounding changed on the calibration set."""
    return _energy(dequantised_KN - w_KN, moments_KK) / jnp.maximum(_energy(w_KN, moments_KK), math.ulp(0.0))


def output_energies(w_KN: Array, rounded: Rounded, moments_KK: Array, format: IntegerFormat) -> Float32[Array, "3"]:
    """Squared norms on the calibration set: of the output, its error by these codes, and that by the nearest of their grid."""
    scale_KN, zero_KN = Grid(rounded.scale_GN, rounded.zero_GN).per_input(format.group)

    def error(codes_KN: Array) -> Array:
        return _energy(scale_KN * (codes_KN - zero_KN) - w_KN, moments_KK)

    nearest_KN = nearest_code(w_KN, scale_KN, zero_KN, format.levels)
    return jnp.stack([_energy(w_KN, moments_KK), error(rounded.codes_KN.astype(jnp.float32)), error(nearest_KN)])
