"""RMSNorm with quantisation for TPU (Mosaic): a program takes whole rows."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.quantize.reference import encode, scale_of
from pallas_kernels.scaled import DTYPES, TILE, Format, Scaled

_ROWS = 128
_PARAMS = pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=48 * 2**20)


def _whole(D: int) -> pl.BlockSpec:
    return pl.BlockSpec((_ROWS, D), lambda i: (i, 0))


_ROW = pl.BlockSpec((1, _ROWS), lambda i: (0, i))  # a number for each row, on lanes


def _forward_kernel(x_ref, scale_ref, values_ref, scales_ref, inverse_ref, *, eps: float, format: Format, power_of_two: bool):
    x = x_ref[...].astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=1, keepdims=True) + eps)
    inverse_ref[...] = inverse.T
    for tile in range(x_ref.shape[1] // TILE):
        at = slice(tile * TILE, (tile + 1) * TILE)
        y = x[:, at] * inverse * scale_ref[:, at]
        scale = scale_of(jnp.max(jnp.abs(y), axis=1, keepdims=True), format, power_of_two)
        values_ref[:, at] = encode(y, 1 / scale, format)
        scales_ref[tile] = scale.T


def rms_norm_quantize(x_TD: jax.Array, scale_D, eps: float, format: Format, power_of_two: bool, interpret: bool = False):
    """See `api.rms_norm_quantize`."""
    T, D = x_TD.shape
    values, scales, inverse = pl.pallas_call(
        functools.partial(_forward_kernel, eps=eps, format=format, power_of_two=power_of_two),
        grid=(pl.cdiv(T, _ROWS),),
        in_specs=[_whole(D), pl.BlockSpec((1, D), lambda i: (0, 0))],
        out_specs=[_whole(D), pl.BlockSpec((D // TILE, 1, _ROWS), lambda i: (0, 0, i)), _ROW],
        out_shape=[
            jax.ShapeDtypeStruct((T, D), DTYPES[format]), jax.ShapeDtypeStruct((D // TILE, 1, T), jnp.float32),
            jax.ShapeDtypeStruct((1, T), jnp.float32),
        ],
        interpret=interpret, name="rms_norm_quantize", compiler_params=_PARAMS,
    )(x_TD, scale_D[None])  # fmt: skip
    return Scaled(values, scales[:, 0]), inverse[0]


def _backward_kernel(x_ref, scale_ref, inverse_ref, dy_ref, dx_ref, dscale_ref, *, rows: int):
    @pl.when(pl.program_id(0) == 0)
    def _():
        dscale_ref[...] = jnp.zeros_like(dscale_ref)

    inverse, dy = inverse_ref[...].T, dy_ref[...].astype(jnp.float32)
    normed, dnormed = x_ref[...].astype(jnp.float32) * inverse, dy * scale_ref[...]
    along = jnp.mean(dnormed * normed, axis=1, keepdims=True)
    dx_ref[...] = ((dnormed - normed * along) * inverse).astype(dx_ref.dtype)
    # the last block's rows beyond the array hold anything, and this sum is over rows
    row = pl.program_id(0) * _ROWS + jax.lax.broadcasted_iota(jnp.int32, normed.shape, 0)
    dscale_ref[...] += jnp.sum(jnp.where(row < rows, dy * normed, 0), axis=0, keepdims=True)


def rms_norm_backward(x_TD: jax.Array, scale_D, inverse_T, dy_TD: jax.Array, interpret: bool = False):
    """See `api.rms_norm_backward`."""
    (T, D), column = x_TD.shape, pl.BlockSpec((1, x_TD.shape[1]), lambda i: (0, 0))
    dx, dscale = pl.pallas_call(
        functools.partial(_backward_kernel, rows=T),
        grid=(pl.cdiv(T, _ROWS),),
        in_specs=[_whole(D), column, _ROW, _whole(D)],
        out_specs=[_whole(D), column],
        out_shape=[jax.ShapeDtypeStruct((T, D), x_TD.dtype), jax.ShapeDtypeStruct((1, D), jnp.float32)],
        interpret=interpret, name="rms_norm_backward", compiler_params=_PARAMS,
    )(x_TD, scale_D[None], inverse_T[None], dy_TD)  # fmt: skip
    return dx, dscale[0]
