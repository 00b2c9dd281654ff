"""Codes for NVIDIA Hopper (Mosaic GPU): a warpgroup for each 64 blocks, whose numbers are read once into shared memory."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import cost
from pallas_kernels.gradient_codes import reference
from pallas_kernels.gradient_codes.reference import TINY, Levels
from pallas_kernels.hopper import ROWS, over_columns

_NUMBERS = 64  # numbers of a block that are in registers at a time


def _piece(smem, at: int, width: int) -> jax.Array:
    return plgpu.load(smem.at[:, pl.ds(at, width)], layout=plgpu.Layout.WGMMA)


def pack(x: jax.Array, error: jax.Array, unit: jax.Array, levels: Levels, interpret: Any = None):
    """See `api.pack_codes`. Raises `Unavailable` for blocks of another size than 256."""
    rows, block = x.shape
    reference.require_block("pack_codes", "hopper", block)
    extra = -rows % ROWS
    x, error, unit = (jnp.pad(a, ((0, extra), (0, 0)), constant_values=c) for a, c in ((x, 0), (error, 0), (unit, 1)))
    width = block * levels.bits // 8
    step = min(width, _NUMBERS)
    pieces = range(0, block, step)
    shape = (ROWS, step)

    def body(x_gmem, error_gmem, unit_gmem, *rest):
        codes_gmem, scales_gmem, residual_gmem, x_smem, error_smem, unit_smem, codes_smem, scales_smem, barrier = rest
        at = pl.ds(lax.axis_index("rows") * ROWS, ROWS)
        for gmem, smem in ((x_gmem, x_smem), (error_gmem, error_smem), (unit_gmem, unit_smem)):
            plgpu.copy_gmem_to_smem(gmem.at[at], smem, barrier)
        plgpu.barrier_wait(barrier)

        def wanted(piece: int) -> jax.Array:
            return _piece(x_smem, piece, step) + _piece(error_smem, piece, step)

        def numbers(piece: int) -> jax.Array:
            return wanted(piece) / _piece(unit_smem, piece, step)

        largest = jnp.max(jnp.abs(numbers(0)), axis=1)
        for piece in pieces[1:]:
            largest = jnp.maximum(largest, jnp.max(jnp.abs(numbers(piece)), axis=1))
        if levels.of_rms:
            bound = over_columns(jnp.maximum(largest, TINY), shape)
            squares = jnp.zeros_like(largest)
            for piece in pieces:
                squares += jnp.sum(jnp.square(reference.ratio(numbers(piece), bound)), axis=1)
            scale = largest * jnp.sqrt(squares / block)
        else:
            scale = largest
            for piece in pieces:
                scale += jnp.sum(0 * numbers(piece), axis=1)
        scale = jnp.where(scale < TINY, 0.0, scale)
        divisor = over_columns(jnp.where(scale == 0, 1.0, scale), shape)
        for column in range(0, width, step):
            byte = jnp.zeros(shape, jnp.int32)
            for place in range(8 // levels.bits):
                piece = place * width + column
                code = reference.code_of(reference.ratio(numbers(piece), divisor), levels)
                byte |= code << (place * levels.bits)
                sent = reference.level_of(code, levels) * over_columns(scale, shape)
                residual = wanted(piece) - sent * _piece(unit_smem, piece, step)
                error_smem[:, pl.ds(piece, step)] = residual
            codes_smem[:, pl.ds(column, step)] = byte.astype(jnp.uint8)
        scales_smem[...] = scale
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(codes_smem, codes_gmem.at[at])
        plgpu.copy_smem_to_gmem(scales_smem, scales_gmem.at[at])
        plgpu.copy_smem_to_gmem(error_smem, residual_gmem.at[at])
        plgpu.wait_smem_to_gmem(0)

    blocks = plgpu.SMEM((ROWS, block), jnp.float32)
    out = (
        jax.ShapeDtypeStruct((rows + extra, width), jnp.uint8),
        jax.ShapeDtypeStruct((rows + extra,), jnp.float32),
        jax.ShapeDtypeStruct((rows + extra, block), jnp.float32),
    )
    codes, scales, residual = plgpu.kernel(
        body,
        out_type=out,
        cost_estimate=cost.pack_codes([x, error, unit], [*out], len(levels.values), levels.of_rms),
        scratch_types=(
            blocks, blocks, blocks, plgpu.SMEM((ROWS, width), jnp.uint8), plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.Barrier(num_arrivals=3),
        ),
        grid=((rows + extra) // ROWS,), grid_names=("rows",), interpret=interpret,
    )(x, error, unit)  # fmt: skip
    return codes[:rows], scales[:rows], residual[:rows]
