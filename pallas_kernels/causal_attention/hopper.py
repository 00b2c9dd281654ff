"""Causal attention within segments for NVIDIA Hopper (Mosaic GPU), forward and backward (FlashAttention-2, arXiv 2307.08691).

A warpgroup has 64 queries of one head (or 64 keys, for their gradients), and another fetches blocks of what they meet; forward,
two of them share what is fetched. Blocks that lie entirely in the future are not visited. Scores are in units of log2, because
the hardware has exp2. One device's heads and sequences: XLA cannot partition a kernel.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import cost
from pallas_kernels.causal_attention.blockwise import RESIDUALS
from pallas_kernels.errors import Unavailable
from pallas_kernels.hopper import COLUMN, ROW, over_columns, summed, tiling
from pallas_kernels.products import einsum

_ROWS = 64  # rows of a warpgroup, as many as wgmma multiplies at once
_GROUPS = 2  # warpgroups of a program of the forward pass; the backward passes' sums take the registers of two
_MINE = _ROWS * _GROUPS  # rows of such a program
_BLOCK = 64  # rows of what they meet in one step
_NEG = -1e30  # finite, so that a row with nothing to attend to yet gives exp2(0), not NaN; it is rescaled away later
_STAGES = 2  # blocks on their way at once
_LOG2E = math.log2(math.e)
_TILED = tiling(jnp.bfloat16)


def _matrix(rows: int, columns: int, dtype, groups: int):
    return plgpu.SMEM((groups, rows, columns), dtype, transforms=_TILED)


def _zeros(*shape: int, fill: float = 0.0):
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else ROW
    return plgpu.layout_cast(jnp.full(shape, fill, jnp.float32), layout)


def _over_rows(x_C, shape):
    return lax.broadcast_in_dim(x_C, shape, (1,))


def _dot(a, b_smem, shape):
    """The product a b of two blocks, in float32."""

    def run(accumulator):
        plgpu.wgmma(accumulator, a, b_smem)
        return accumulator[...]

    return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))  # pyright: ignore[reportPrivateImportUsage]


def _stored(x, smem):
    """`smem` with x in it, for the tensor cores to read. The caller has waited for those that read it before."""
    smem[...] = x.astype(smem.dtype)
    plgpu.commit_smem()
    return smem


def _dot_transposed(a, b_smem, shape):
    """The product a b^T of two blocks, in float32."""
    return _dot(a, b_smem.transpose((1, 0)), shape)


def _visible(first_row, first_column, segment_row, segment_column, shape, queries_are_rows: bool):
    """Mask of the pairs that may meet: the same segment, no key after its query."""
    row, column = (plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1))
    row, column = row + first_row, column + first_column
    ahead = row >= column if queries_are_rows else column >= row
    return ahead & (over_columns(segment_row, shape) == _over_rows(segment_column, shape))


def _position(groups: int) -> tuple:
    """This program's batch, head and warpgroup, and the warpgroup's first row."""
    group = lax.axis_index("warpgroup")
    return lax.axis_index("batch"), lax.axis_index("head"), group, (lax.axis_index("block") * groups + group) * _ROWS


def _fetch(pairs, barriers) -> None:
    for (source, target), barrier in zip(pairs, barriers, strict=True):
        plgpu.copy_gmem_to_smem(source, target, barrier)
    for barrier in barriers:
        plgpu.barrier_wait(barrier)


def _pipeline(step, steps, first, matrices: list[tuple[Any, int]], rows: list, compute, groups: int):
    """`step` over blocks `first`, `first` + 1, ... of what a warpgroup meets: matrices [L, columns], and vectors [L]."""
    of_matrix = [plgpu.BlockSpec((_BLOCK, columns), lambda i: (first + i, 0), transforms=_TILED) for _, columns in matrices]
    of_row = [plgpu.BlockSpec((_BLOCK,), lambda i: (first + i,)) for _ in rows]
    plgpu.emit_pipeline_warp_specialized(
        step, grid=(steps,), in_specs=[*of_matrix, *of_row], compute_context=compute, num_compute_wgs=groups,
        wg_axis="warpgroup", memory_registers=40, max_concurrent_steps=_STAGES,
    )(*(matrix for matrix, _ in matrices), *rows)  # fmt: skip


def _run(body, out_type, scratch, groups: int, columns: int, inputs: tuple, interpret: Any):
    """The kernel's results. `columns` are multiplied for each pair of a query and a key; the first input is q [B, L, H, X]."""
    B, L, H, _ = inputs[0].shape
    return plgpu.kernel(
        body, out_type=out_type, scratch_types=scratch,
        grid=(H, L // (groups * _ROWS), B), grid_names=("head", "block", "batch"),
        num_threads=groups + 1, thread_name="warpgroup", interpret=interpret,
        cost_estimate=cost.causal_attention([*inputs], jax.tree.leaves(out_type), B * H * L * L // 2, columns),
    )(*inputs)  # fmt: skip


def _forward(q_BLHX, k_BLHX, v_BLHU, segment_BL, scale: float, interpret: Any):
    """The output [B, L, H, U] and the rows' log2-sum-exp2 [B, H, L], float32."""
    (B, L, H, X), U, dtype = q_BLHX.shape, v_BLHU.shape[-1], q_BLHX.dtype
    shape = (_ROWS, _BLOCK)

    def body(
        q_gmem, k_gmem, v_gmem, segment_gmem, out_gmem, lse_gmem, q_smem, segment_smem, out_smem, lse_smem, p_smem, *barriers
    ):
        batch, head, group, row = _position(_GROUPS)
        mine = pl.ds(row, _ROWS)

        def compute(run):
            pairs = [
                (q_gmem.at[batch, mine, head], q_smem.at[group]), (segment_gmem.at[batch, mine], segment_smem.at[group])
            ]  # fmt: skip
            _fetch(pairs, [b.at[group] for b in barriers])
            out, total, top = run((_zeros(_ROWS, U), _zeros(_ROWS), _zeros(_ROWS, fill=_NEG)))
            out_smem[group] = (out * over_columns(1 / total, (_ROWS, U))).astype(dtype)
            lse_smem[group] = top + jnp.log(total) * _LOG2E
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[group], out_gmem.at[batch, mine, head])
            plgpu.copy_smem_to_gmem(lse_smem.at[group], lse_gmem.at[batch, head, mine])
            plgpu.wait_smem_to_gmem(0)

        def step(index, k_smem, v_smem, segment_k_smem, carry):
            out, total, top = carry
            s = _dot_transposed(q_smem.at[group], k_smem, shape) * (scale * _LOG2E)
            segment_q = plgpu.load(segment_smem.at[group], layout=ROW)
            segment_k = plgpu.load(segment_k_smem, layout=COLUMN)
            s = jnp.where(_visible(row, index[0] * _BLOCK, segment_q, segment_k, shape, True), s, _NEG)
            new_top = jnp.maximum(top, jnp.max(s, axis=1))
            p = jnp.exp2(s - over_columns(new_top, shape))
            shrink = jnp.exp2(top - new_top)
            total = total * shrink + jnp.sum(p, axis=1)
            out = out * over_columns(shrink, (_ROWS, U)) + _dot(_stored(p, p_smem.at[group]), v_smem, (_ROWS, U))
            return out, total, new_top

        steps = (lax.axis_index("block") + 1) * (_MINE // _BLOCK)
        matrices = [(k_gmem.at[batch, :, head], X), (v_gmem.at[batch, :, head], U)]
        _pipeline(step, steps, 0, matrices, [segment_gmem.at[batch]], compute, _GROUPS)

    out = (jax.ShapeDtypeStruct((B, L, H, U), dtype), jax.ShapeDtypeStruct((B, H, L), jnp.float32))
    scratch = (
        _matrix(_ROWS, X, dtype, _GROUPS), plgpu.SMEM((_GROUPS, _ROWS), jnp.int32), _matrix(_ROWS, U, dtype, _GROUPS),
        plgpu.SMEM((_GROUPS, _ROWS), jnp.float32), _matrix(_ROWS, _BLOCK, dtype, _GROUPS),
        *[plgpu.Barrier(num_barriers=_GROUPS)] * 2,
    )  # fmt: skip
    return _run(body, out, scratch, _GROUPS, X + U, (q_BLHX, k_BLHX, v_BLHU, segment_BL), interpret)


def _gradient_of_queries(q_BLHX, k_BLHX, v_BLHU, segment_BL, dout_BLHU, lse_BHL, delta_BHL, scale: float, interpret: Any):
    X, U, dtype = q_BLHX.shape[-1], v_BLHU.shape[-1], q_BLHX.dtype
    shape = (_ROWS, _BLOCK)

    def body(
        q_gmem, k_gmem, v_gmem, segment_gmem, dout_gmem, lse_gmem, delta_gmem, dq_gmem,
        q_smem, dout_smem, segment_smem, lse_smem, delta_smem, ds_smem, *barriers,
    ):  # fmt: skip
        batch, head, group, row = _position(1)
        mine, sums = pl.ds(row, _ROWS), []

        def compute(run):
            pairs = [
                (q_gmem.at[batch, mine, head], q_smem.at[group]), (dout_gmem.at[batch, mine, head], dout_smem.at[group]),
                (segment_gmem.at[batch, mine], segment_smem.at[group]), (lse_gmem.at[batch, head, mine], lse_smem.at[group]),
                (delta_gmem.at[batch, head, mine], delta_smem.at[group]),
            ]  # fmt: skip
            _fetch(pairs, [b.at[group] for b in barriers])
            dq = summed(run, sums, (_ROWS, X))
            plgpu.copy_smem_to_gmem(_stored(dq * scale, q_smem.at[group]), dq_gmem.at[batch, mine, head])
            plgpu.wait_smem_to_gmem(0)

        def step(index, k_smem, v_smem, segment_k_smem, carry):
            s = _dot_transposed(q_smem.at[group], k_smem, shape) * (scale * _LOG2E)
            segment_q = plgpu.load(segment_smem.at[group], layout=ROW)
            segment_k = plgpu.load(segment_k_smem, layout=COLUMN)
            s = jnp.where(_visible(row, index[0] * _BLOCK, segment_q, segment_k, shape, True), s, _NEG)
            lse, delta = (plgpu.load(a.at[group], layout=ROW) for a in (lse_smem, delta_smem))
            p = jnp.exp2(s - over_columns(lse, shape))
            dp = _dot_transposed(dout_smem.at[group], v_smem, shape)
            ds = p * (dp - over_columns(delta, shape))
            plgpu.wgmma(sums[0], _stored(ds, ds_smem.at[group]), k_smem)
            plgpu.wgmma_wait(0)  # before the block that it reads is fetched anew
            return carry

        steps = (lax.axis_index("block") + 1) * (_ROWS // _BLOCK)
        matrices = [(k_gmem.at[batch, :, head], X), (v_gmem.at[batch, :, head], U)]
        _pipeline(step, steps, 0, matrices, [segment_gmem.at[batch]], compute, 1)

    vector = plgpu.SMEM((1, _ROWS), jnp.float32)
    scratch = (
        _matrix(_ROWS, X, dtype, 1), _matrix(_ROWS, U, dtype, 1), plgpu.SMEM((1, _ROWS), jnp.int32),
        vector, vector, _matrix(_ROWS, _BLOCK, dtype, 1), *[plgpu.Barrier(num_barriers=1)] * 5,
    )  # fmt: skip
    out = jax.ShapeDtypeStruct(q_BLHX.shape, dtype)
    inputs = q_BLHX, k_BLHX, v_BLHU, segment_BL, dout_BLHU, lse_BHL, delta_BHL
    return _run(body, out, scratch, 1, 2 * X + U, inputs, interpret)


def _gradient_of_keys(
    q_BLHX, k_BLHX, v_BLHU, segment_BL, dout_BLHU, lse_BHL, delta_BHL, scale: float, interpret: Any, of_values: bool
):
    """dk, or dv with `of_values`: both sums at once do not fit a warpgroup's registers.

    Scores are transposed, keys as rows, over the blocks of queries from the diagonal on.
    """
    (_, L, _, X), U, dtype = q_BLHX.shape, v_BLHU.shape[-1], q_BLHX.dtype
    shape, like = (_ROWS, _BLOCK), v_BLHU if of_values else k_BLHX

    def body(
        q_gmem, k_gmem, v_gmem, segment_gmem, dout_gmem, lse_gmem, delta_gmem, d_gmem,
        k_smem, v_smem, segment_smem, p_smem, *barriers,
    ):  # fmt: skip
        batch, head, group, row = _position(1)
        mine, sums = pl.ds(row, _ROWS), []
        first = lax.axis_index("block") * (_ROWS // _BLOCK)

        def compute(run):
            pairs = [
                (k_gmem.at[batch, mine, head], k_smem.at[group]), (v_gmem.at[batch, mine, head], v_smem.at[group]),
                (segment_gmem.at[batch, mine], segment_smem.at[group]),
            ]  # fmt: skip
            _fetch(pairs, [b.at[group] for b in barriers])
            d = summed(run, sums, (_ROWS, like.shape[-1]))
            d_smem = (v_smem if of_values else k_smem).at[group]
            d = d if of_values else d * scale
            plgpu.copy_smem_to_gmem(_stored(d, d_smem), d_gmem.at[batch, mine, head])
            plgpu.wait_smem_to_gmem(0)

        def step(index, q_smem, dout_smem, lse_smem, delta_smem, segment_q_smem, carry):
            factor = 1.0
            if not of_values:
                dp = _dot_transposed(v_smem.at[group], dout_smem, shape)
                factor = dp - _over_rows(plgpu.load(delta_smem, layout=COLUMN), shape)
            s = _dot_transposed(k_smem.at[group], q_smem, shape)
            segment_k = plgpu.load(segment_smem.at[group], layout=ROW)
            segment_q = plgpu.load(segment_q_smem, layout=COLUMN)
            visible = _visible(row, (first + index[0]) * _BLOCK, segment_k, segment_q, shape, False)
            lse = _over_rows(plgpu.load(lse_smem, layout=COLUMN), shape)
            p = jnp.where(visible, jnp.exp2(s * (scale * _LOG2E) - lse), 0)
            plgpu.wgmma(sums[0], _stored(p * factor, p_smem.at[group]), dout_smem if of_values else q_smem)
            plgpu.wgmma_wait(0)  # before the block that it reads is fetched anew
            return carry

        matrices = [(q_gmem.at[batch, :, head], X), (dout_gmem.at[batch, :, head], U)]
        vectors = [lse_gmem.at[batch, head], delta_gmem.at[batch, head], segment_gmem.at[batch]]
        _pipeline(step, L // _BLOCK - first, first, matrices, vectors, compute, 1)

    scratch = (
        _matrix(_ROWS, X, dtype, 1), _matrix(_ROWS, U, dtype, 1), plgpu.SMEM((1, _ROWS), jnp.int32),
        _matrix(_ROWS, _BLOCK, dtype, 1), *[plgpu.Barrier(num_barriers=1)] * 3,
    )  # fmt: skip
    out = jax.ShapeDtypeStruct(like.shape, dtype)
    inputs = q_BLHX, k_BLHX, v_BLHU, segment_BL, dout_BLHU, lse_BHL, delta_BHL
    return _run(body, out, scratch, 1, X + U if of_values else 2 * X + U, inputs, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(q_BLHX, k_BLHX, v_BLHU, segment_BL, scale: float, interpret: Any):
    return _forward(q_BLHX, k_BLHX, v_BLHU, segment_BL, scale, interpret)[0]


def _attention_fwd(q_BLHX, k_BLHX, v_BLHU, segment_BL, scale: float, interpret: Any):
    out_BLHU, lse_BHL = checkpoint_name(_forward(q_BLHX, k_BLHX, v_BLHU, segment_BL, scale, interpret), RESIDUALS)
    return out_BLHU, (q_BLHX, k_BLHX, v_BLHU, segment_BL, out_BLHU, lse_BHL)


def _attention_bwd(scale: float, interpret: Any, residuals, dout_BLHU):
    q_BLHX, k_BLHX, v_BLHU, segment_BL, out_BLHU, lse_BHL = residuals
    # row sums of p * dp, which the softmax's gradient needs (FlashAttention-2, section 3.1)
    delta_BHL = einsum("blhu,blhu->bhl", out_BLHU, dout_BLHU, dtype=jnp.float32)
    arguments = (q_BLHX, k_BLHX, v_BLHU, segment_BL, dout_BLHU, lse_BHL, delta_BHL, scale, interpret)
    dk_BLHX, dv_BLHU = (_gradient_of_keys(*arguments, of_values=of_values) for of_values in (False, True))
    return _gradient_of_queries(*arguments), dk_BLHX, dv_BLHU, None


_attention.defvjp(_attention_fwd, _attention_bwd)


@functools.partial(jax.named_call, name="causal_attention_hopper")
def causal_attention(q_BLHX, k_BLHX, v_BLHU, segment_BL, scale: float, interpret: Any = None):
    """See `api.causal_attention`; lengths and head sizes are padded. Raises `Unavailable` unless in bfloat16."""
    if q_BLHX.dtype != jnp.bfloat16:
        raise Unavailable(f"causal_attention: the hopper kernel takes bfloat16, not {q_BLHX.dtype}; use xla")
    L, U = q_BLHX.shape[1], v_BLHU.shape[-1]

    def padded(x_BLHX):
        return jnp.pad(x_BLHX, ((0, 0), (0, -L % _MINE), (0, 0), (0, -x_BLHX.shape[-1] % 64)))

    # padding gets a segment of its own: no real query sees it, and its rows still have themselves to attend to
    segment_BL = jnp.pad(segment_BL.astype(jnp.int32), ((0, 0), (0, -L % _MINE)), constant_values=-1)
    out_BLHU = _attention(padded(q_BLHX), padded(k_BLHX), padded(v_BLHU), segment_BL, scale, interpret)
    return out_BLHU[:, :L, :, :U]
