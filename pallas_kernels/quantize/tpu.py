"""Quantisation for TPU (Mosaic)."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import cost
from pallas_kernels.quantize.reference import encode, scale_of
from pallas_kernels.scaled import DTYPES, TILE, Format, Scaled, pad_to_tiles
from pallas_kernels.tpu import block_columns

_ROWS = 256  # rows of a program's block, a multiple of both kinds of groups
_COLUMNS = 1024


def _kernel(x_ref, values_ref, scales_ref, *, rows: int, format: Format, power_of_two: bool):
    for tile in range(x_ref.shape[1] // TILE):
        at = slice(tile * TILE, (tile + 1) * TILE)
        x = x_ref[:, at].astype(jnp.float32)
        amax = jnp.max(jnp.abs(x), axis=1, keepdims=True)
        if rows > 1:
            groups = [jnp.broadcast_to(jnp.max(amax[i : i + rows]), (rows, 1)) for i in range(0, x.shape[0], rows)]
            amax = jnp.concatenate(groups)
        scale = scale_of(amax, format, power_of_two)
        values_ref[:, at] = encode(x, 1 / scale, format)
        scales_ref[tile] = scale.T  # Mosaic wants the long axis on lanes


def quantize(x: jax.Array, rows: int, format: Format, power_of_two: bool, interpret: bool = False) -> Scaled:
    """See `api.quantize`."""
    M, K = x.shape
    x = pad_to_tiles(x, rows)
    width = block_columns(x.shape[1], _COLUMNS)
    out = [
        jax.ShapeDtypeStruct(x.shape, DTYPES[format]),
        jax.ShapeDtypeStruct((x.shape[1] // TILE, 1, x.shape[0]), jnp.float32),
    ]
    values, scales = pl.pallas_call(
        functools.partial(_kernel, rows=rows, format=format, power_of_two=power_of_two),
        grid=(pl.cdiv(x.shape[0], _ROWS), x.shape[1] // width),
        in_specs=[pl.BlockSpec((_ROWS, width), lambda i, k: (i, k))],
        out_specs=[
            pl.BlockSpec((_ROWS, width), lambda i, k: (i, k)),
            pl.BlockSpec((width // TILE, 1, _ROWS), lambda i, k: (k, 0, i)),
        ],
        out_shape=out,
        cost_estimate=cost.quantize([x], out),
        interpret=interpret,
        name="quantize",
    )(x)
    return Scaled(values[:M, :K], scales[:, 0, ::rows])


def _transposing_kernel(x_ref, *refs, format: Format, power_of_two: bool):
    *row_scales_ref, values_ref, scales_ref = refs
    for column in range(x_ref.shape[1] // TILE):
        at = slice(column * TILE, (column + 1) * TILE)
        x = x_ref[:, at].astype(jnp.float32)
        if row_scales_ref:
            x = x * row_scales_ref[0][column].T
        x = x.T
        scale = scale_of(jnp.max(jnp.abs(x), axis=1, keepdims=True), format, power_of_two)
        values_ref[at] = encode(x, 1 / scale, format)
        scales_ref[0, :, at] = scale.T


def quantize_transposed(x: jax.Array | Scaled, format: Format, power_of_two: bool, interpret: bool = False) -> Scaled:
    """See `api.quantize_transposed`: 128 rows of x a program."""
    values = x.values if isinstance(x, Scaled) else x
    M, K = values.shape
    values = pad_to_tiles(values, TILE)
    width = block_columns(values.shape[1], _COLUMNS)
    inputs, in_specs = [values], [pl.BlockSpec((TILE, width), lambda i, k: (i, k))]
    if isinstance(x, Scaled):
        inputs.append(jnp.pad(x.row_scales(), ((0, 0), (0, values.shape[0] - M)))[:, None])
        in_specs.append(pl.BlockSpec((width // TILE, 1, TILE), lambda i, k: (k, 0, i)))
    out = [
        jax.ShapeDtypeStruct(values.shape[::-1], DTYPES[format]),
        jax.ShapeDtypeStruct((values.shape[0] // TILE, 1, values.shape[1]), jnp.float32),
    ]
    quantized, scales = pl.pallas_call(
        functools.partial(_transposing_kernel, format=format, power_of_two=power_of_two),
        grid=(values.shape[0] // TILE, values.shape[1] // width),
        in_specs=in_specs,
        out_specs=[
            pl.BlockSpec((width, TILE), lambda i, k: (k, i)),
            pl.BlockSpec((1, 1, width), lambda i, k: (i, 0, k)),
        ],
        out_shape=out,
        cost_estimate=cost.quantize(inputs, out, dequantizes=isinstance(x, Scaled)),
        interpret=interpret,
        name="quantize_transposed",
    )(*inputs)
    return Scaled(quantized[:K, :M], scales[:, 0, :K])
