"""Grouped SwiGLU in 8 bits (arXiv 2412.19437, section 3.3): every product a block-scaled kernel, two for each of three passes.

Slots lie as rows in blocks of 128 that share an expert, which is also the tile of tokens that shares a scale in the weights'
gradients. Tokens go to their rows in 8 bits. Kept for the backward pass are x and [gate, up], both in 8 bits; what SwiGLU makes
of them is computed again. A routing weight multiplies scales, not values: it is one number a row.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.grouped_swiglu.blocked import RESIDUALS
from pallas_kernels.grouped_swiglu.rows import Rows, rows_of_slots, sum_choices
from pallas_kernels.quantize import reference
from pallas_kernels.scaled import TILE, Format, Gemms, Scaled, bits, from_bits, tiles
from pallas_kernels.scaled_linear.operands import quantized, quantized_transposed, swiglu_quantized
from pallas_kernels.scaled_matmul.api import grouped_scaled_matmul, grouped_scaled_wgrad
from pallas_kernels.swiglu_quantize.api import swiglu_backward


def _stacked(w_EXY: jax.Array, format: Format, gemms: Gemms) -> Scaled:
    """[E * X, Y], the experts' matrices one below the other."""
    E, X, Y = w_EXY.shape
    if not gemms.per_tensor:
        return quantized(w_EXY.reshape(E * X, Y), TILE, format, gemms)
    values, scales = jax.vmap(lambda w: reference.quantize(w, None, format, gemms.power_of_two))(w_EXY)
    return Scaled(values.reshape(E * X, Y), jnp.moveaxis(scales, 0, 1).reshape(tiles(Y), E * X))


def _transposed(w: Scaled, experts: int) -> Scaled:
    """[E * Y, X] from [E * X, Y]: every expert's matrix transposed, and its blocks with it."""
    values = w.values.reshape(experts, -1, w.values.shape[1]).swapaxes(1, 2)
    E, Y, X = values.shape
    if w.rows == TILE:
        scales = w.scales.reshape(tiles(Y), E, tiles(X)).transpose(2, 1, 0).reshape(tiles(X), E * tiles(Y))
    else:  # one scale for an expert
        scales = jnp.broadcast_to(jnp.repeat(w.scales[0].reshape(E, X)[:, 0], Y), (tiles(X), E * Y))
    return Scaled(values.reshape(E * Y, X), scales)


def _at_rows(x: Scaled, format: Format, rows: Rows) -> Scaled:
    """Tokens at their rows; zeros in padding."""
    values = bits(x).values.at[rows.token_R].get(mode="fill", fill_value=0)
    return from_bits(Scaled(values, x.row_scales().at[:, rows.token_R].get(mode="fill", fill_value=1)), format)


def _groups(rows: Rows, experts: int) -> jax.Array:
    """The expert of each block of rows; `experts` for those that are not there, which come last."""
    (blocks,) = rows.blocks
    block = jnp.arange(rows.token_R.size // TILE)
    expert_b = jnp.append(blocks.expert_b, jnp.full(block.size, experts, blocks.expert_b.dtype))[: block.size]
    return jnp.where(block < blocks.count, expert_b, experts).astype(jnp.int32)


def _forward(gemms: Gemms, x_TD, w_gate_up_EDX, w_down_EMD, expert_TK, weight_TK):
    (E, D, X), dtype = w_gate_up_EDX.shape, x_TD.dtype
    rows = rows_of_slots(expert_TK, E, (TILE,))
    group_b, weight_R = _groups(rows, E), weight_TK.reshape(-1).at[rows.slot_R].get(mode="fill", fill_value=0)
    product = functools.partial(grouped_scaled_matmul, dtype=dtype, implementation=gemms.implementation)
    x = quantized(x_TD, 1, gemms.forward, gemms)
    w_gate_up, w_down = (_transposed(_stacked(w, gemms.forward, gemms), E) for w in (w_gate_up_EDX, w_down_EMD))
    gate_up_RX = product(_at_rows(x, gemms.forward, rows), w_gate_up, group_b, X)
    h, gate_up = swiglu_quantized(gate_up_RX, gemms)
    y_RD = product(Scaled(h.values, h.row_scales() * weight_R), w_down, group_b, D)
    return sum_choices(y_RD, rows), (x, gate_up)


def _backward(gemms: Gemms, x: Scaled, gate_up: Scaled, w_gate_up_EDX, w_down_EMD, expert_TK, weight_TK, dy_TD):
    (E, M, D), dtype = w_down_EMD.shape, dy_TD.dtype
    rows = rows_of_slots(expert_TK, E, (TILE,))
    group_b, weight_R = _groups(rows, E), weight_TK.reshape(-1).at[rows.slot_R].get(mode="fill", fill_value=0)
    product = functools.partial(grouped_scaled_matmul, dtype=dtype, implementation=gemms.implementation)

    def wgrad(a_RA: jax.Array | Scaled, b_RB: jax.Array, dtype: jnp.dtype) -> jax.Array:
        a, b = (quantized_transposed(m, gemms) for m in (a_RA, b_RB))
        return grouped_scaled_wgrad(a, b, group_b, E, dtype, gemms.implementation)

    dy = quantized(dy_TD, 1, gemms.dgrad, gemms)
    dh_RM = product(_at_rows(dy, gemms.dgrad, rows), _stacked(w_down_EMD, gemms.dgrad, gemms), group_b, M)
    dgate_up_RX, h_RM, dweight_R = swiglu_backward(gate_up, dh_RM, weight_R, gemms.implementation)
    dgate_up = quantized(dgate_up_RX, 1, gemms.dgrad, gemms)
    dx_RD = product(dgate_up, _stacked(w_gate_up_EDX, gemms.dgrad, gemms), group_b, D)

    # the weight goes with dy here, where each row is touched anyway
    dy_RD = (dy_TD.at[rows.token_R].get(mode="fill", fill_value=0) * weight_R[:, None]).astype(dtype)
    dw_gate_up_EDX = wgrad(_at_rows(x, gemms.forward, rows), dgate_up_RX, w_gate_up_EDX.dtype)
    dw_down_EMD = wgrad(h_RM, dy_RD, w_down_EMD.dtype)
    dweight_TK = dweight_R.at[rows.row_TK].get(mode="fill", fill_value=0)
    return sum_choices(dx_RD, rows), dw_gate_up_EDX, dw_down_EMD, dweight_TK


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_swiglu(gemms: Gemms, x_TD, w_gate_up_EDX, w_down_EMD, expert_TK, weight_TK):
    return _forward(gemms, x_TD, w_gate_up_EDX, w_down_EMD, expert_TK, weight_TK)[0]


def _grouped_swiglu_fwd(gemms: Gemms, x_TD, *args):
    y_TD, (x, gate_up) = _forward(gemms, x_TD, *args)
    return y_TD, (bits(x), checkpoint_name(bits(gate_up), RESIDUALS), args)  # x costs little to quantise again


def _grouped_swiglu_bwd(gemms: Gemms, residuals, dy_TD):
    x, gate_up, (w_gate_up_EDX, w_down_EMD, expert_TK, weight_TK) = residuals
    x, gate_up = (from_bits(kept, gemms.forward) for kept in (x, gate_up))
    dx_TD, dw_gate_up_EDX, dw_down_EMD, dweight_TK = _backward(
        gemms, x, gate_up, w_gate_up_EDX, w_down_EMD, expert_TK, weight_TK, dy_TD
    )
    return dx_TD, dw_gate_up_EDX, dw_down_EMD, None, dweight_TK


_grouped_swiglu.defvjp(_grouped_swiglu_fwd, _grouped_swiglu_bwd)


def _whole_tiles(a: jax.Array, *axes: int) -> jax.Array:
    """Zeros after the end of these axes, up to multiples of 128."""
    pad: list[Any] = [(0, -size % TILE if axis in axes else 0) for axis, size in enumerate(a.shape)]
    return jnp.pad(a, pad) if any(after for _, after in pad) else a


@functools.partial(jax.named_call, name="grouped_swiglu_scaled")
def grouped_swiglu(x_TD, w_gate_up_ED2M, w_down_EMD, expert_TK, weight_TK, gemms: Gemms):
    """See `api.grouped_swiglu`."""
    D = x_TD.shape[1]
    w_gate_up_ED2M, w_down_EMD = _whole_tiles(w_gate_up_ED2M, 1, 3), _whole_tiles(w_down_EMD, 1, 2)
    w_gate_up_EDX = w_gate_up_ED2M.reshape(*w_gate_up_ED2M.shape[:2], -1)
    return _grouped_swiglu(gemms, _whole_tiles(x_TD, 1), w_gate_up_EDX, w_down_EMD, expert_TK, weight_TK)[:, :D]
