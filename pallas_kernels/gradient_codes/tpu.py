"""Codes for TPU (Mosaic): numbers are read once, and only codes, scales and the residual are written."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import cost
from pallas_kernels.errors import Unavailable
from pallas_kernels.gradient_codes import reference
from pallas_kernels.gradient_codes.reference import Levels

_ROWS = 128  # blocks of numbers in a program
_REPLICAS = 32  # most replicas whose codes a program holds at once


def _pack_kernel(x_ref, error_ref, unit_ref, codes_ref, scales_ref, residual_ref, *, levels: Levels):
    codes, scale, residual = reference.pack(x_ref[...], error_ref[...], unit_ref[...], levels)
    codes_ref[...] = codes
    scales_ref[...] = scale[None]
    residual_ref[...] = residual


def pack(x: jax.Array, error: jax.Array, unit: jax.Array, levels: Levels, interpret: bool = False):
    """See `api.pack_codes`. Raises `Unavailable` for blocks of another size than 256."""
    rows, block = x.shape
    reference.require_block("pack_codes", "tpu", block)
    width = block * levels.bits // 8
    blocks = pl.BlockSpec((_ROWS, block), lambda i: (i, 0))
    out = [
        jax.ShapeDtypeStruct((rows, width), jnp.uint8),
        jax.ShapeDtypeStruct((1, rows), jnp.float32),
        jax.ShapeDtypeStruct((rows, block), jnp.float32),
    ]
    codes, scales, residual = pl.pallas_call(
        functools.partial(_pack_kernel, levels=levels),
        grid=(pl.cdiv(rows, _ROWS),),
        in_specs=[blocks] * 3,
        out_specs=[pl.BlockSpec((_ROWS, width), lambda i: (i, 0)), pl.BlockSpec((1, _ROWS), lambda i: (0, i)), blocks],
        out_shape=out,
        cost_estimate=cost.pack_codes([x, error, unit], out, len(levels.values), levels.of_rms),
        interpret=interpret,
        name="pack_codes",
    )(x, error, unit)
    return codes, scales[0], residual


def _mean_kernel(codes_ref, scales_ref, mean_ref, *, levels: Levels):
    replicas = codes_ref.shape[0]
    total = jnp.zeros(mean_ref.shape, jnp.float32)
    for r in range(replicas):
        code = reference.unpacked(codes_ref[r], levels.bits)
        total += reference.level_of(code, levels) * scales_ref[r, 0][:, None]
    mean_ref[...] = total / replicas


def mean(codes: jax.Array, scales: jax.Array, levels: Levels, interpret: bool = False) -> jax.Array:
    """See `api.mean_of_codes`. Raises `Unavailable` for blocks of another size than 256, and more than 32 replicas."""
    replicas, rows, width = codes.shape
    block = width * 8 // levels.bits
    reference.require_block("mean_of_codes", "tpu", block)
    if replicas > _REPLICAS:
        raise Unavailable(f"mean_of_codes: the tpu kernel takes at most {_REPLICAS} replicas, not {replicas}; use xla")
    out = jax.ShapeDtypeStruct((rows, block), jnp.float32)
    return pl.pallas_call(
        functools.partial(_mean_kernel, levels=levels),
        grid=(pl.cdiv(rows, _ROWS),),
        in_specs=[
            pl.BlockSpec((replicas, _ROWS, width), lambda i: (0, i, 0)),
            pl.BlockSpec((replicas, 1, _ROWS), lambda i: (0, 0, i)),
        ],
        out_specs=pl.BlockSpec((_ROWS, block), lambda i: (i, 0)),
        out_shape=out,
        cost_estimate=cost.mean_of_codes([codes, scales], out, len(levels.values), levels.of_rms),
        interpret=interpret,
        name="mean_of_codes",
    )(codes, scales[:, None])
