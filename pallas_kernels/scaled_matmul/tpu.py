"""The scaled matrix product for TPU (Mosaic)."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.quantize.tpu import columns
from pallas_kernels.scaled import TILE, Scaled

_M, _N, _K = 512, 512, 1024  # of a program's block: 4 MB of VMEM with double buffering


def _kernel(a_ref, a_scale_ref, b_ref, b_scale_ref, y_ref, sum_ref):
    @pl.when(pl.program_id(2) == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    exact = jnp.int32 if a_ref.dtype == jnp.int8 else jnp.float32
    for tile in range(a_ref.shape[1] // TILE):
        k = slice(tile * TILE, (tile + 1) * TILE)
        dot = lax.dot_general(a_ref[:, k], b_ref[:, k], (((1,), (1,)), ((), ())), preferred_element_type=exact)
        # into float32 after 128 numbers, where the scales change
        sum_ref[...] += dot.astype(jnp.float32) * a_scale_ref[tile].T * b_scale_ref[tile]

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        y_ref[...] = sum_ref[...].astype(y_ref.dtype)


def _padded(x: Scaled):
    """Values with whole tiles along K, and scales [k_tiles, 1, M], as Mosaic wants them."""
    pad = -x.values.shape[1] % TILE
    return (jnp.pad(x.values, ((0, 0), (0, pad))) if pad else x.values), x.row_scales()[:, None]


def scaled_matmul(a: Scaled, b: Scaled, dtype, interpret: bool = False) -> jax.Array:
    """See `api.scaled_matmul`."""
    (a_MK, a_scale), (b_NK, b_scale) = _padded(a), _padded(b)
    (M, K), N = a_MK.shape, b_NK.shape[0]
    width = columns(K, _K)
    return pl.pallas_call(
        _kernel,
        grid=(pl.cdiv(M, _M), pl.cdiv(N, _N), K // width),
        in_specs=[
            pl.BlockSpec((_M, width), lambda i, j, k: (i, k)),
            pl.BlockSpec((width // TILE, 1, _M), lambda i, j, k: (k, 0, i)),
            pl.BlockSpec((_N, width), lambda i, j, k: (j, k)),
            pl.BlockSpec((width // TILE, 1, _N), lambda i, j, k: (k, 0, j)),
        ],
        out_specs=pl.BlockSpec((_M, _N), lambda i, j, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct((M, N), dtype),
        scratch_shapes=[pltpu.VMEM((_M, _N), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="scaled_matmul",
    )(a_MK, a_scale, b_NK, b_scale)
