"""SwiGLU with quantisation for NVIDIA Hopper (Mosaic GPU): one warpgroup for 64 rows of one tile of gate and up."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import cost
from pallas_kernels.errors import Unavailable
from pallas_kernels.hopper import BLOCK, ROWS, load, over_columns, pad_rows
from pallas_kernels.quantize.reference import encode, scale_of
from pallas_kernels.scaled import DTYPES, TILE, Format, Scaled

_HALF = TILE // 2


def _fetch(pairs, barrier) -> None:
    """Global memory to shared memory, and wait."""
    for source, target in pairs:
        plgpu.copy_gmem_to_smem(source, target, barrier)
    plgpu.barrier_wait(barrier)


def _require_whole_tiles(operation: str, F: int) -> None:
    if F % TILE:
        raise Unavailable(f"{operation}: the hopper kernel takes a multiple of {TILE} columns, not {F}; use xla")


def swiglu_quantize(gate_up_TX: jax.Array, format: Format, power_of_two: bool, interpret: Any = None):
    """See `api.swiglu_quantize`. Raises `Unavailable` for columns that are no whole tiles."""
    T, X = gate_up_TX.shape
    _require_whole_tiles("swiglu_quantize", X // 2)
    gate_up_TX, halves = pad_rows(gate_up_TX), X // (2 * TILE)
    padded = gate_up_TX.shape[0]

    def body(x_gmem, h_gmem, h_scale_gmem, kept_gmem, kept_scale_gmem, gate_smem, up_smem, out_smem, scale_smem, barrier):
        i, j = lax.axis_index("rows"), lax.axis_index("columns")
        rows = pl.ds(i * ROWS, ROWS)
        at_gate, at_up = pl.ds(j * TILE, TILE), pl.ds((halves + j) * TILE, TILE)
        _fetch([(x_gmem.at[rows, at_gate], gate_smem), (x_gmem.at[rows, at_up], up_smem)], barrier)
        gate, up = load(gate_smem), load(up_smem)
        results = [
            (gate / (1 + jnp.exp(-gate)) * up, h_gmem, h_scale_gmem, at_gate, j),
            (gate, kept_gmem, kept_scale_gmem, at_gate, j),
            (up, kept_gmem, kept_scale_gmem, at_up, halves + j),
        ]
        for n, (x, _, _, _, _) in enumerate(results):
            scale = scale_of(jnp.max(jnp.abs(x), axis=1), format, power_of_two)
            out_smem[n] = encode(x, over_columns(1 / scale), format)
            scale_smem[n] = scale
        plgpu.commit_smem()
        for n, (_, values_gmem, scale_gmem, at, tile) in enumerate(results):
            plgpu.copy_smem_to_gmem(out_smem.at[n], values_gmem.at[rows, at])
            plgpu.copy_smem_to_gmem(scale_smem.at[pl.ds(n, 1)], scale_gmem.at[pl.ds(tile, 1), rows])
        plgpu.wait_smem_to_gmem(0)

    shapes = [
        [jax.ShapeDtypeStruct((padded, C), DTYPES[format]), jax.ShapeDtypeStruct((C // TILE, padded), jnp.float32)]
        for C in (X // 2, X)
    ]
    h, h_scale, kept, kept_scale = plgpu.kernel(
        body,
        out_type=(*shapes[0], *shapes[1]), cost_estimate=cost.swiglu_quantize(gate_up_TX, [*shapes[0], *shapes[1]]),
        scratch_types=(
            plgpu.SMEM(BLOCK, gate_up_TX.dtype), plgpu.SMEM(BLOCK, gate_up_TX.dtype),
            plgpu.SMEM((3, *BLOCK), DTYPES[format]), plgpu.SMEM((3, ROWS), jnp.float32), plgpu.Barrier(num_arrivals=2),
        ),
        grid=(padded // ROWS, halves), grid_names=("rows", "columns"),
        interpret=interpret,
    )(gate_up_TX)  # fmt: skip
    return Scaled(h[:T], h_scale[:, :T]), Scaled(kept[:T], kept_scale[:, :T])


def swiglu_backward(kept: Scaled, dh_TF: jax.Array, weight_T: jax.Array, interpret: Any = None):
    """See `api.swiglu_backward`. Raises `Unavailable` as `swiglu_quantize`.

    Each tile's part of dweight is written; their sum is XLA's.
    """
    T, F = dh_TF.shape
    _require_whole_tiles("swiglu_backward", F)
    values, dh_TF, halves = pad_rows(kept.values), pad_rows(dh_TF), F // TILE
    padded = dh_TF.shape[0]
    scales, weight_T = jnp.pad(kept.scales, ((0, 0), (0, padded - T))), jnp.pad(weight_T, (0, padded - T))

    def body(
        kept_gmem, scale_gmem, dh_gmem, weight_gmem, d_gmem, h_gmem, dweight_gmem,
        gate_smem, up_smem, dh_smem, row_smem, out_smem, dweight_smem, barrier,
    ):  # fmt: skip
        i, j = lax.axis_index("rows"), lax.axis_index("columns")
        rows = pl.ds(i * ROWS, ROWS)
        at_gate, at_up = pl.ds(j * TILE, TILE), pl.ds((halves + j) * TILE, TILE)
        pairs = [
            (kept_gmem.at[rows, at_gate], gate_smem), (kept_gmem.at[rows, at_up], up_smem),
            (dh_gmem.at[rows, at_gate], dh_smem),
            (scale_gmem.at[j, rows], row_smem.at[0]), (scale_gmem.at[halves + j, rows], row_smem.at[1]),
            (weight_gmem.at[rows], row_smem.at[2]),
        ]  # fmt: skip
        _fetch(pairs, barrier)

        def of_rows(n: int) -> jax.Array:
            row = plgpu.load(row_smem.at[n], layout=plgpu.Layout.WGMMA.reduce(1))
            return lax.broadcast_in_dim(row, (ROWS, _HALF), (0,))

        def half(h, dweight):
            at = pl.ds(h * _HALF, _HALF)
            gate, up = load(gate_smem.at[:, at]) * of_rows(0), load(up_smem.at[:, at]) * of_rows(1)
            dh, sigmoid = load(dh_smem.at[:, at]), 1 / (1 + jnp.exp(-gate))
            silu = gate * sigmoid
            dweight += jnp.sum(dh * silu * up, axis=1)
            out_smem[2, :, at] = (silu * up).astype(out_smem.dtype)
            dh = dh * of_rows(2)
            out_smem[0, :, at] = (dh * up * (sigmoid + silu * (1 - sigmoid))).astype(out_smem.dtype)
            out_smem[1, :, at] = (dh * silu).astype(out_smem.dtype)
            return dweight

        # half a tile at a time: what a whole one needs does not fit a thread's registers
        zeros = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), plgpu.Layout.WGMMA.reduce(1))
        dweight_smem[0] = lax.fori_loop(0, TILE // _HALF, half, zeros)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem.at[0], d_gmem.at[rows, at_gate])
        plgpu.copy_smem_to_gmem(out_smem.at[1], d_gmem.at[rows, at_up])
        plgpu.copy_smem_to_gmem(out_smem.at[2], h_gmem.at[rows, at_gate])
        plgpu.copy_smem_to_gmem(dweight_smem, dweight_gmem.at[pl.ds(j, 1), rows])
        plgpu.wait_smem_to_gmem(0)

    out = (
        jax.ShapeDtypeStruct((padded, 2 * F), dh_TF.dtype), jax.ShapeDtypeStruct((padded, F), dh_TF.dtype),
        jax.ShapeDtypeStruct((halves, padded), jnp.float32),
    )  # fmt: skip
    d, h, dweight = plgpu.kernel(
        body,
        out_type=out, cost_estimate=cost.swiglu_backward([values, scales, dh_TF, weight_T], [*out]),
        scratch_types=(
            plgpu.SMEM(BLOCK, values.dtype), plgpu.SMEM(BLOCK, values.dtype), plgpu.SMEM(BLOCK, dh_TF.dtype),
            plgpu.SMEM((3, ROWS), jnp.float32), plgpu.SMEM((3, *BLOCK), dh_TF.dtype), plgpu.SMEM((1, ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=6),
        ),
        grid=(padded // ROWS, halves), grid_names=("rows", "columns"),
        interpret=interpret,
    )(values, scales, dh_TF, weight_T)  # fmt: skip
    return d[:T], h[:T], jnp.sum(dweight, axis=0)[:T]
