"""Logits and their statistics for NVIDIA Hopper (Mosaic GPU): a block of logits is summed up before it leaves the chip.

A block computes 128 x 128 logits with two warpgroups of 64 tokens each, while a third fetches the next tiles.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import cost
from pallas_kernels.errors import Unavailable
from pallas_kernels.hopper import BLOCK, ROW, ROWS, over_columns, summed, tiling
from pallas_kernels.linear_cross_entropy.statistics import NEG, LogitStatistics, over_blocks
from pallas_kernels.scaled import TILE, tiles

_STEP = 64  # numbers of the hidden size in one step: rows of 128 bytes
_STAGES = 4  # steps on their way at once: 128 KiB of shared memory


def _body(vocabulary: int, keep: bool, x_gmem, w_gmem, target_gmem, *rest):
    logits_gmem, rest = (rest[0], rest[1:]) if keep else (None, rest)
    top_gmem, total_gmem, at_target_gmem, target_smem, statistics_smem, logits_smem, barrier = rest
    m, n, group = lax.axis_index("m"), lax.axis_index("n"), lax.axis_index("warpgroup")
    half, mine, sums = pl.ds(group * ROWS, ROWS), pl.ds(m * TILE + group * ROWS, ROWS), []

    def step(_, x_smem, w_smem, carry):
        plgpu.wgmma(sums[0], x_smem.at[half], w_smem)
        plgpu.wgmma_wait(1)  # the step before is done with its tiles, which may be fetched anew
        return carry

    def compute(run):
        plgpu.copy_gmem_to_smem(target_gmem.at[mine], target_smem.at[group], barrier.at[group])
        logits = summed(run, sums, BLOCK)
        plgpu.barrier_wait(barrier.at[group])
        target = plgpu.load(target_smem.at[group], layout=ROW)
        column = n * TILE + plgpu.broadcasted_iota(jnp.int32, BLOCK, 1, layout=plgpu.Layout.WGMMA)
        there = column < vocabulary
        logits = jnp.where(there, logits, NEG)
        at_target = jnp.where(there & (column == over_columns(target)), logits, 0)
        top = jnp.max(logits, axis=1)
        exp = jnp.exp(logits - over_columns(top))
        found = ((top, top_gmem), (jnp.sum(exp, axis=1), total_gmem), (jnp.sum(at_target, axis=1), at_target_gmem))
        for i, (numbers, _) in enumerate(found):
            statistics_smem[group, i] = numbers
        if keep:
            logits_smem[half] = logits
        plgpu.commit_smem()
        for i, (_, gmem) in enumerate(found):
            plgpu.copy_smem_to_gmem(statistics_smem.at[group, i], gmem.at[n, mine])
        if logits_gmem is not None:
            plgpu.copy_smem_to_gmem(logits_smem.at[half], logits_gmem.at[mine, pl.ds(n * TILE, TILE)])
        plgpu.wait_smem_to_gmem(0)

    plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(x_gmem.shape[1] // _STEP,),
        in_specs=[
            plgpu.BlockSpec((TILE, _STEP), lambda k: (0, k), transforms=tiling(x_gmem.dtype), delay_release=1),
            plgpu.BlockSpec((_STEP, TILE), lambda k: (k, 0), transforms=tiling(x_gmem.dtype), delay_release=1),
        ],
        compute_context=compute, num_compute_wgs=2, wg_axis="warpgroup", memory_registers=40, max_concurrent_steps=_STAGES,
    )(x_gmem.at[pl.ds(m * TILE, TILE)], w_gmem.at[:, pl.ds(n * TILE, TILE)])  # fmt: skip


def logit_statistics(x_TD: jax.Array, w_DV: jax.Array, target_T, keep: bool, interpret: Any = None) -> LogitStatistics:
    """See `statistics.logit_statistics`; axes are padded to whole tiles. Raises `Unavailable` unless in bfloat16."""
    if x_TD.dtype != jnp.bfloat16:
        raise Unavailable(f"logit_statistics: the hopper kernel takes bfloat16, not {x_TD.dtype}; use xla")
    (T, D), V = x_TD.shape, w_DV.shape[1]
    x_TD = jnp.pad(x_TD, ((0, -T % TILE), (0, -D % _STEP)))
    w_DV = jnp.pad(w_DV, ((0, -D % _STEP), (0, -V % TILE)))
    target_T = jnp.pad(target_T.astype(jnp.int32), (0, -T % TILE))
    padded = x_TD.shape[0], w_DV.shape[1]
    of_blocks = jax.ShapeDtypeStruct((tiles(V), padded[0]), jnp.float32)
    logits_smem = plgpu.SMEM((TILE, TILE) if keep else (8, 128), jnp.float32)
    out = [jax.ShapeDtypeStruct(padded, jnp.float32)] * keep + [of_blocks] * 3
    kernel = plgpu.kernel(
        lambda *refs: _body(V, keep, *refs),
        out_type=out, cost_estimate=cost.logit_statistics(x_TD, w_DV, out, tiles(V), padded[0] // TILE),
        scratch_types=[
            plgpu.SMEM((2, ROWS), jnp.int32), plgpu.SMEM((2, 3, ROWS), jnp.float32), logits_smem,
            plgpu.Barrier(num_barriers=2),
        ],
        grid=(padded[0] // TILE, tiles(V)), grid_names=("m", "n"), num_threads=3, thread_name="warpgroup",
        interpret=interpret,
    )  # fmt: skip
    *logits, top, total, at_target = kernel(x_TD, w_DV, target_T)
    return over_blocks(top[:, :T], total[:, :T], at_target[:, :T], logits[0][:T, :V] if keep else None)
