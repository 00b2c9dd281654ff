"""The scaled matrix product for TPU (Mosaic)."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import cost
from pallas_kernels.products import dot_general
from pallas_kernels.scaled import TILE, Scaled
from pallas_kernels.tpu import block_columns

_M, _N, _K = 512, 512, 1024  # sizes of a program's block: 4 MB of VMEM with double buffering


def _kernel(_, a_ref, a_scale_ref, b_ref, b_scale_ref, y_ref, sum_ref):
    @pl.when(pl.program_id(2) == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    exact = jnp.int32 if a_ref.dtype == jnp.int8 else jnp.float32
    for tile in range(a_ref.shape[1] // TILE):
        k = slice(tile * TILE, (tile + 1) * TILE)
        dot = dot_general(a_ref[:, k], b_ref[:, k], (((1,), (1,)), ((), ())), exact)
        # into float32 after 128 numbers, where the scales change
        sum_ref[...] += dot.astype(jnp.float32) * a_scale_ref[tile].T * b_scale_ref[tile]

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        y_ref[...] = sum_ref[...].astype(y_ref.dtype)


def _padded(x: Scaled):
    """Values with whole tiles along K, and scales [k_tiles, 1, M], as Mosaic wants them."""
    pad = -x.values.shape[1] % TILE
    return (jnp.pad(x.values, ((0, 0), (0, pad))) if pad else x.values), x.row_scales()[:, None]


def _run(a: Scaled, b: Scaled, group_b: jax.Array, blocks: tuple[int, int], N: int, dtype, interpret: bool) -> jax.Array:
    """Blocks of rows of a, each with the N rows of b that its group has."""
    (a_MK, a_scale), (b_NK, b_scale) = _padded(a), _padded(b)
    (M, K), (block_m, block_n) = a_MK.shape, blocks
    width, per_group = block_columns(K, _K), pl.cdiv(N, block_n)
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(pl.cdiv(M, block_m), per_group, K // width),
        in_specs=[
            pl.BlockSpec((block_m, width), lambda i, j, k, _: (i, k)),
            pl.BlockSpec((width // TILE, 1, block_m), lambda i, j, k, _: (k, 0, i)),
            pl.BlockSpec((block_n, width), lambda i, j, k, group: (group[i] * per_group + j, k)),
            pl.BlockSpec((width // TILE, 1, block_n), lambda i, j, k, group: (k, 0, group[i] * per_group + j)),
        ],
        out_specs=pl.BlockSpec((block_m, block_n), lambda i, j, k, _: (i, j)),
        scratch_shapes=[pltpu.VMEM((block_m, block_n), jnp.float32)],
    )
    out = jax.ShapeDtypeStruct((M, N), dtype)
    # each block of rows of a reads the N rows of b that its group has
    of_group = [jax.ShapeDtypeStruct((N, K), b_NK.dtype), jax.ShapeDtypeStruct((K // TILE, 1, N), b_scale.dtype)]
    return pl.pallas_call(
        _kernel, grid_spec=grid, out_shape=out, interpret=interpret, name="scaled_matmul",
        cost_estimate=cost.scaled_product([a_MK, a_scale], of_group, out, K, per_group, pl.cdiv(M, block_m)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
    )(group_b, a_MK, a_scale, b_NK, b_scale)  # fmt: skip


def scaled_matmul(a: Scaled, b: Scaled, dtype, interpret: bool = False) -> jax.Array:
    """See `api.scaled_matmul`."""
    one_group = jnp.zeros(pl.cdiv(a.values.shape[0], _M), jnp.int32)
    return _run(a, b, one_group, (_M, _N), b.values.shape[0], dtype, interpret)


def grouped_scaled_matmul(a: Scaled, b: Scaled, group_b: jax.Array, N: int, dtype, interpret: bool = False) -> jax.Array:
    """See `api.grouped_scaled_matmul`."""
    there_b = jnp.minimum(group_b, b.values.shape[0] // N - 1)
    return _run(a, b, there_b, (TILE, block_columns(N, _N)), N, dtype, interpret)


def _wgrad_kernel(group_ref, block_ref, a_ref, a_scale_ref, b_ref, b_scale_ref, y_ref, sum_ref):
    visit, last = pl.program_id(2), pl.num_programs(2) - 1
    group = group_ref[visit]

    @pl.when((visit == 0) | (group != group_ref[jnp.maximum(visit - 1, 0)]))
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(block_ref[visit] >= 0)
    def _():
        exact = jnp.int32 if a_ref.dtype == jnp.int8 else jnp.float32
        dot = dot_general(a_ref[...], b_ref[...], (((1,), (1,)), ((), ())), exact)
        sum_ref[...] += dot.astype(jnp.float32) * a_scale_ref[0].T * b_scale_ref[0]

    @pl.when((visit == last) | (group != group_ref[jnp.minimum(visit + 1, last)]))
    def _():
        y_ref[0] = sum_ref[...].astype(y_ref.dtype)


def _visits(group_b: jax.Array, groups: int) -> tuple[jax.Array, jax.Array]:
    """(group, block or -1) of each program along the sum: every group's blocks, and one visit more, which writes zeros for a
    group that has none."""
    visited = jnp.concatenate([group_b, jnp.arange(groups, dtype=group_b.dtype)])
    order = jnp.argsort(visited, stable=True)
    there = (order < group_b.size) & (visited[order] < groups)
    return jnp.minimum(visited[order], groups - 1), jnp.where(there, order, -1).astype(jnp.int32)


def grouped_scaled_wgrad(a: Scaled, b: Scaled, group_b: jax.Array, groups: int, dtype, interpret: bool = False) -> jax.Array:
    """See `api.grouped_scaled_wgrad`."""
    A, B = a.values.shape[0], b.values.shape[0]
    block_a, block_b = block_columns(A, _M), block_columns(B, _N)

    def block(v, block_v):
        return jnp.maximum(block_v[v], 0)

    group_v, block_v = _visits(group_b, groups)
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(A // block_a, B // block_b, group_v.size),
        in_specs=[
            pl.BlockSpec((block_a, TILE), lambda i, j, v, _, block_v: (i, block(v, block_v))),
            pl.BlockSpec((1, 1, block_a), lambda i, j, v, _, block_v: (block(v, block_v), 0, i)),
            pl.BlockSpec((block_b, TILE), lambda i, j, v, _, block_v: (j, block(v, block_v))),
            pl.BlockSpec((1, 1, block_b), lambda i, j, v, _, block_v: (block(v, block_v), 0, j)),
        ],
        out_specs=pl.BlockSpec((1, block_a, block_b), lambda i, j, v, group_v, _: (group_v[v], i, j)),
        scratch_shapes=[pltpu.VMEM((block_a, block_b), jnp.float32)],
    )
    out = jax.ShapeDtypeStruct((groups, A, B), dtype)
    a_inputs, b_inputs = ([x.values, x.row_scales()[:, None]] for x in (a, b))
    return pl.pallas_call(
        _wgrad_kernel, grid_spec=grid, out_shape=out, interpret=interpret, name="scaled_wgrad",
        cost_estimate=cost.scaled_product(a_inputs, b_inputs, out, TILE * group_b.size // groups, B // block_b, A // block_a),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
    )(group_v, block_v, *a_inputs, *b_inputs)  # fmt: skip
