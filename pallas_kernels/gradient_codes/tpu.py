"""Codes for TPU (Mosaic): numbers are read once, and only codes, scales and what is owed are written."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.gradient_codes import reference
from pallas_kernels.gradient_codes.reference import Levels

_ROWS = 128  # of a program


def _pack_kernel(x_ref, owed_ref, unit_ref, codes_ref, scales_ref, left_ref, *, levels: Levels):
    codes, scale, left = reference.pack(x_ref[...], owed_ref[...], unit_ref[...], levels)
    codes_ref[...] = codes
    scales_ref[...] = scale[None]
    left_ref[...] = left


def pack(x: jax.Array, owed: jax.Array, unit: jax.Array, levels: Levels, interpret: bool = False):
    """See `api.pack_codes`."""
    rows, block = x.shape
    width = block * levels.bits // 8
    whole = pl.BlockSpec((_ROWS, block), lambda i: (i, 0))
    codes, scales, left = pl.pallas_call(
        functools.partial(_pack_kernel, levels=levels),
        grid=(pl.cdiv(rows, _ROWS),),
        in_specs=[whole] * 3,
        out_specs=[pl.BlockSpec((_ROWS, width), lambda i: (i, 0)), pl.BlockSpec((1, _ROWS), lambda i: (0, i)), whole],
        out_shape=[
            jax.ShapeDtypeStruct((rows, width), jnp.uint8),
            jax.ShapeDtypeStruct((1, rows), jnp.float32),
            jax.ShapeDtypeStruct((rows, block), jnp.float32),
        ],
        interpret=interpret,
        name="pack_codes",
    )(x, owed, unit)
    return codes, scales[0], left


def _mean_kernel(codes_ref, scales_ref, mean_ref, *, levels: Levels):
    replicas = codes_ref.shape[0]
    total = jnp.zeros(mean_ref.shape, jnp.float32)
    for r in range(replicas):
        code = reference.unpacked(codes_ref[r], levels.bits)
        total += reference.level_of(code, levels) * scales_ref[r, 0][:, None]
    mean_ref[...] = total / replicas


def mean(codes: jax.Array, scales: jax.Array, levels: Levels, interpret: bool = False) -> jax.Array:
    """See `api.mean_of_codes`."""
    replicas, rows, width = codes.shape
    block = width * 8 // levels.bits
    return pl.pallas_call(
        functools.partial(_mean_kernel, levels=levels),
        grid=(pl.cdiv(rows, _ROWS),),
        in_specs=[
            pl.BlockSpec((replicas, _ROWS, width), lambda i: (0, i, 0)),
            pl.BlockSpec((replicas, 1, _ROWS), lambda i: (0, 0, i)),
        ],
        out_specs=pl.BlockSpec((_ROWS, block), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((rows, block), jnp.float32),
        interpret=interpret,
        name="mean_of_codes",
    )(codes, scales[:, None])
