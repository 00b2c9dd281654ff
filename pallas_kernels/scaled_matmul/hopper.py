"""The scaled matrix product for NVIDIA Hopper (Mosaic GPU).

A block computes 128 x 128 results with two warpgroups of 64 rows each, while a third fetches the next tiles. After each 128
numbers of the sum, the tensor cores' partial result goes to float32 registers with its scales: their accumulators keep
about 14 bits (section 3.3.2), and a fresh one every 128 is what keeps long sums right.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import cost
from pallas_kernels.errors import Unavailable
from pallas_kernels.hopper import COLUMN, ROW, tiling
from pallas_kernels.scaled import TILE, Scaled, tiles

_HALF = 64  # rows of a warpgroup
_STAGES = 4  # tiles on their way at once: 132 KiB of shared memory


def _padded(x: Scaled):
    M, K = x.values.shape
    values = jnp.pad(x.values, ((0, -M % TILE), (0, -K % TILE))) if M % TILE or K % TILE else x.values
    return values, jnp.pad(x.row_scales(), ((0, 0), (0, -M % TILE)))


def _product(steps, first, a_gmem, a_scale_gmem, b_gmem, b_scale_gmem, y_gmem, y_smem):
    """y [128, 128] = a b^T over `steps` tiles of the sum's axis from tile `first` on; a and b have 128 rows each."""
    warpgroup = lax.axis_index("warpgroup")
    mine, shape = pl.ds(warpgroup * _HALF, _HALF), (_HALF, TILE)

    def step(_, a_smem, a_scale_smem, b_smem, b_scale_smem, total):
        def dot(accumulator):
            plgpu.wgmma(accumulator, a_smem.at[mine], b_smem.transpose((1, 0)))
            return accumulator[...]

        partial = pl.run_scoped(dot, plgpu.ACC(shape, jnp.float32))  # pyright: ignore[reportPrivateImportUsage]
        a_scale = plgpu.load(a_scale_smem.at[0, mine], layout=ROW)
        b_scale = plgpu.load(b_scale_smem.at[0], layout=COLUMN)
        scale = lax.broadcast_in_dim(a_scale, shape, (0,)) * lax.broadcast_in_dim(b_scale, shape, (1,))
        return total + partial * scale

    def compute(run_steps):
        total = run_steps(plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA))
        y_smem[mine] = total.astype(y_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(y_smem.at[mine], y_gmem.at[mine])
        plgpu.wait_smem_to_gmem(0)

    values = {"memory_space": plgpu.SMEM, "transforms": tiling(a_gmem.dtype)}
    plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(steps,),
        in_specs=[
            plgpu.BlockSpec((TILE, TILE), lambda k: (0, first + k), **values),
            plgpu.BlockSpec((1, TILE), lambda k: (first + k, 0), memory_space=plgpu.SMEM),
            plgpu.BlockSpec((TILE, TILE), lambda k: (0, first + k), **values),
            plgpu.BlockSpec((1, TILE), lambda k: (first + k, 0), memory_space=plgpu.SMEM),
        ],
        compute_context=compute, num_compute_wgs=2, wg_axis="warpgroup", memory_registers=40, max_concurrent_steps=_STAGES,
    )(a_gmem, a_scale_gmem, b_gmem, b_scale_gmem)  # fmt: skip


def _body(group_gmem, a_gmem, a_scale_gmem, b_gmem, b_scale_gmem, y_gmem, y_smem):
    m, n = lax.axis_index("m"), lax.axis_index("n")
    rows, cols = pl.ds(m * TILE, TILE), pl.ds(n * TILE, TILE)
    of_group = pl.ds(group_gmem[m] * y_gmem.shape[1] + n * TILE, TILE)  # the rows of b that are this block's columns
    _product(
        a_gmem.shape[1] // TILE, 0, a_gmem.at[rows], a_scale_gmem.at[:, rows], b_gmem.at[of_group],
        b_scale_gmem.at[:, of_group], y_gmem.at[rows, cols], y_smem,
    )  # fmt: skip


def _wgrad_body(first_gmem, count_gmem, a_gmem, a_scale_gmem, b_gmem, b_scale_gmem, y_gmem, y_smem):
    group, m, n = lax.axis_index("group"), lax.axis_index("m"), lax.axis_index("n")
    rows, cols = pl.ds(m * TILE, TILE), pl.ds(n * TILE, TILE)
    _product(
        count_gmem[group], first_gmem[group], a_gmem.at[rows], a_scale_gmem.at[:, rows], b_gmem.at[cols],
        b_scale_gmem.at[:, cols], y_gmem.at[group, rows, cols], y_smem,
    )  # fmt: skip


def _kernel(body, out_type, grid: dict[str, int], estimate: pl.CostEstimate, interpret: Any):
    """Two warpgroups that compute and one that fetches, for each point of the grid."""
    scratch = (plgpu.SMEM((TILE, TILE), out_type.dtype, transforms=tiling(out_type.dtype)),)
    return plgpu.kernel(
        body, out_type=out_type, scratch_types=scratch, grid=tuple(grid.values()), grid_names=tuple(grid), num_threads=3,
        thread_name="warpgroup", cost_estimate=estimate, interpret=interpret,
    )  # fmt: skip


def _refuse_int8(x: Scaled) -> None:
    if x.values.dtype == jnp.int8:
        raise Unavailable("scaled_matmul: no int8 kernel for Hopper, whose wgmma in Mosaic GPU takes none; use e4m3, or xla")


def _run(a: Scaled, b: Scaled, group_b: jax.Array, N: int, dtype, interpret: Any) -> jax.Array:
    """128 rows of a at a time, each with the N rows of b that its group has."""
    _refuse_int8(a)
    (a_MK, a_scale), (b_NK, b_scale) = _padded(a), _padded(b)
    M = a_MK.shape[0]
    out = jax.ShapeDtypeStruct((M, N), dtype)
    K = a_MK.shape[1]
    # each block of rows of a reads the N rows of b that its group has
    of_group = [jax.ShapeDtypeStruct((N, K), b_NK.dtype), jax.ShapeDtypeStruct((K // TILE, N), b_scale.dtype)]
    estimate = cost.scaled_product([a_MK, a_scale], of_group, out, K, N // TILE, M // TILE)
    return _kernel(_body, out, {"m": M // TILE, "n": N // TILE}, estimate, interpret)(group_b, a_MK, a_scale, b_NK, b_scale)


def scaled_matmul(a: Scaled, b: Scaled, dtype, interpret: Any = None) -> jax.Array:
    """See `api.scaled_matmul`. Raises `Unavailable` for int8, which Mosaic GPU's wgmma does not take."""
    M, N = a.values.shape[0], b.values.shape[0]
    one_group = jnp.zeros(tiles(M), jnp.int32)
    return _run(a, b, one_group, tiles(N) * TILE, dtype, interpret)[:M, :N]


def grouped_scaled_matmul(a: Scaled, b: Scaled, group_b: jax.Array, N: int, dtype, interpret: Any = None) -> jax.Array:
    """See `api.grouped_scaled_matmul`. Raises `Unavailable` as `scaled_matmul`."""
    return _run(a, b, jnp.minimum(group_b, b.values.shape[0] // N - 1), N, dtype, interpret)


def grouped_scaled_wgrad(a: Scaled, b: Scaled, group_b: jax.Array, groups: int, dtype, interpret: Any = None) -> jax.Array:
    """See `api.grouped_scaled_wgrad`. Raises `Unavailable` as `scaled_matmul`."""
    _refuse_int8(a)
    A, B = a.values.shape[0], b.values.shape[0]
    count_G = jnp.bincount(group_b, length=groups).astype(jnp.int32)
    first_G = (jnp.cumsum(count_G) - count_G).astype(jnp.int32)
    out = jax.ShapeDtypeStruct((groups, A, B), dtype)
    a_inputs, b_inputs = ([x.values, x.row_scales()] for x in (a, b))
    estimate = cost.scaled_product(a_inputs, b_inputs, out, TILE * group_b.size // groups, B // TILE, A // TILE)
    kernel = _kernel(_wgrad_body, out, {"group": groups, "m": A // TILE, "n": B // TILE}, estimate, interpret)
    return kernel(first_G, count_G, *a_inputs, *b_inputs)
