"""Logits and their statistics for TPU (Mosaic): a block of logits is summed up before it leaves the chip."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import cost
from pallas_kernels.linear_cross_entropy.statistics import NEG, LogitStatistics, over_blocks
from pallas_kernels.products import dot
from pallas_kernels.scaled import TILE
from pallas_kernels.tpu import block_columns

_M, _N, _K = 512, 512, 1024  # sizes of a program's block: 9 MB of VMEM with double buffering


def _kernel(x_ref, w_ref, target_ref, *rest, vocabulary: int, keep: bool):
    *logits_ref, top_ref, total_ref, at_target_ref, sum_ref = rest
    first = pl.program_id(1) * sum_ref.shape[1]  # column of the vocabulary

    @pl.when(pl.program_id(2) == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    sum_ref[...] += dot(x_ref[...], w_ref[...], dtype=jnp.float32)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        column = first + jax.lax.broadcasted_iota(jnp.int32, sum_ref.shape, 1)
        there = column < vocabulary  # the last block's columns beyond the array hold anything
        logits = jnp.where(there, sum_ref[...], NEG)
        top = jnp.max(logits, axis=1, keepdims=True)
        at_target = jnp.where(there & (column == target_ref[...].T), logits, 0)
        top_ref[0] = top.T
        total_ref[0] = jnp.sum(jnp.exp(logits - top), axis=1, keepdims=True).T
        at_target_ref[0] = jnp.sum(at_target, axis=1, keepdims=True).T
        if keep:
            logits_ref[0][...] = logits


def logit_statistics(x_TD: jax.Array, w_DV: jax.Array, target_T, keep: bool, interpret: bool = False) -> LogitStatistics:
    """See `statistics.logit_statistics`; D is padded to a multiple of 128."""
    pad = -x_TD.shape[1] % TILE
    if pad:
        x_TD, w_DV = jnp.pad(x_TD, ((0, 0), (0, pad))), jnp.pad(w_DV, ((0, pad), (0, 0)))
    (T, D), V = x_TD.shape, w_DV.shape[1]
    width, block_n = block_columns(D, _K), min(_N, -(-V // TILE) * TILE)
    grid = (pl.cdiv(T, _M), pl.cdiv(V, block_n), D // width)
    row = pl.BlockSpec((1, 1, _M), lambda i, j, k: (j, 0, i))  # a number for each row, on lanes
    of_blocks = jax.ShapeDtypeStruct((grid[1], 1, T), jnp.float32)
    logits_spec, logits_shape = pl.BlockSpec((_M, block_n), lambda i, j, k: (i, j)), jax.ShapeDtypeStruct((T, V), jnp.float32)
    out = [logits_shape] * keep + [of_blocks] * 3
    *logits, top, total, at_target = pl.pallas_call(
        functools.partial(_kernel, vocabulary=V, keep=keep),
        grid=grid,
        in_specs=[
            pl.BlockSpec((_M, width), lambda i, j, k: (i, k)),
            pl.BlockSpec((width, block_n), lambda i, j, k: (k, j)),
            pl.BlockSpec((1, _M), lambda i, j, k: (0, i)),
        ],
        out_specs=[logits_spec] * keep + [row] * 3,
        out_shape=out,
        cost_estimate=cost.logit_statistics(x_TD, w_DV, out, x_reads=grid[1], w_reads=grid[0]),
        scratch_shapes=[pltpu.VMEM((_M, block_n), jnp.float32)],
        interpret=interpret, name="logit_statistics",
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
    )(x_TD, w_DV, target_T[None])  # fmt: skip
    return over_blocks(top[:, 0], total[:, 0], at_target[:, 0], logits[0] if keep else None)
