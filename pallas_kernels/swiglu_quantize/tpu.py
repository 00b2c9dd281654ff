"""SwiGLU with quantisation for TPU (Mosaic): a program takes whole rows, in which gate meets up."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import cost
from pallas_kernels.errors import Unavailable
from pallas_kernels.quantize.reference import encode, scale_of
from pallas_kernels.scaled import DTYPES, TILE, Format, Scaled
from pallas_kernels.swiglu_quantize.reference import backward

_ROWS = 128
LARGEST = 8192  # columns of gate and of up: beyond, 128 rows with their results don't fit a v5p's VMEM twice
_PARAMS = pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=56 * 2**20)


def _tiles(F: int):
    """(number, columns of gate, columns of up) of each tile."""
    for tile in range(F // TILE):
        yield tile, slice(tile * TILE, (tile + 1) * TILE), slice(F + tile * TILE, F + (tile + 1) * TILE)


def _put(x, values_ref, at: slice, scales_ref, tile: int, format: Format, power_of_two: bool):
    scale = scale_of(jnp.max(jnp.abs(x), axis=1, keepdims=True), format, power_of_two)
    values_ref[:, at] = encode(x, 1 / scale, format)
    scales_ref[tile] = scale.T


def _forward_kernel(gate_up_ref, h_ref, h_scale_ref, kept_ref, kept_scale_ref, *, format: Format, power_of_two: bool):
    F = h_ref.shape[1]
    put = functools.partial(_put, format=format, power_of_two=power_of_two)
    for tile, at_gate, at_up in _tiles(F):
        gate, up = gate_up_ref[:, at_gate].astype(jnp.float32), gate_up_ref[:, at_up].astype(jnp.float32)
        put(jax.nn.silu(gate) * up, h_ref, at_gate, h_scale_ref, tile)
        put(gate, kept_ref, at_gate, kept_scale_ref, tile)
        put(up, kept_ref, at_up, kept_scale_ref, F // TILE + tile)


def _rows(columns: int) -> pl.BlockSpec:
    return pl.BlockSpec((_ROWS, columns), lambda i: (i, 0))


def _scales(columns: int) -> pl.BlockSpec:
    return pl.BlockSpec((columns // TILE, 1, _ROWS), lambda i: (0, 0, i))


def _require_whole_tiles(operation: str, F: int) -> None:
    if F % TILE or F > LARGEST:
        raise Unavailable(f"{operation}: the tpu kernel takes a multiple of {TILE} columns, up to {LARGEST}, not {F}; use xla")


def swiglu_quantize(gate_up_TX: jax.Array, format: Format, power_of_two: bool, interpret: bool = False):
    """See `api.swiglu_quantize`. Raises `Unavailable` for columns that are no whole tiles, or more than `LARGEST`."""
    T, X = gate_up_TX.shape
    _require_whole_tiles("swiglu_quantize", X // 2)
    shapes = [
        [jax.ShapeDtypeStruct((T, C), DTYPES[format]), jax.ShapeDtypeStruct((C // TILE, 1, T), jnp.float32)]
        for C in (X // 2, X)
    ]
    h, h_scale, kept, kept_scale = pl.pallas_call(
        functools.partial(_forward_kernel, format=format, power_of_two=power_of_two),
        grid=(pl.cdiv(T, _ROWS),),
        in_specs=[_rows(X)],
        out_specs=[_rows(X // 2), _scales(X // 2), _rows(X), _scales(X)],
        out_shape=[*shapes[0], *shapes[1]], cost_estimate=cost.swiglu_quantize(gate_up_TX, [*shapes[0], *shapes[1]]),
        interpret=interpret, name="swiglu_quantize", compiler_params=_PARAMS,
    )(gate_up_TX)  # fmt: skip
    return Scaled(h, h_scale[:, 0]), Scaled(kept, kept_scale[:, 0])


def _backward_kernel(kept_ref, scale_ref, dh_ref, weight_ref, d_ref, h_ref, dweight_ref):
    F, weight, total = dh_ref.shape[1], weight_ref[...].T, jnp.zeros(dweight_ref.shape[1:], jnp.float32)
    for tile, at_gate, at_up in _tiles(F):
        gate = kept_ref[:, at_gate].astype(jnp.float32) * scale_ref[tile].T
        up = kept_ref[:, at_up].astype(jnp.float32) * scale_ref[F // TILE + tile].T
        d, h_ref[:, at_gate], dweight = backward(gate, up, dh_ref[:, at_gate].astype(jnp.float32), weight, d_ref.dtype)
        d_ref[:, at_gate], d_ref[:, at_up] = d[:, :TILE], d[:, TILE:]
        total += dweight
    dweight_ref[...] = total[None]


def swiglu_backward(kept: Scaled, dh_TF: jax.Array, weight_T: jax.Array, interpret: bool = False):
    """See `api.swiglu_backward`. Raises `Unavailable` as `swiglu_quantize`."""
    _require_whole_tiles("swiglu_backward", dh_TF.shape[1])
    (T, F), row = dh_TF.shape, pl.BlockSpec((1, _ROWS), lambda i: (0, i))
    inputs = [kept.values, kept.scales[:, None], dh_TF, weight_T[None]]
    out = [
        jax.ShapeDtypeStruct((T, 2 * F), dh_TF.dtype), jax.ShapeDtypeStruct((T, F), dh_TF.dtype),
        jax.ShapeDtypeStruct((1, T), jnp.float32),
    ]  # fmt: skip
    d, h, dweight = pl.pallas_call(
        _backward_kernel,
        grid=(pl.cdiv(T, _ROWS),),
        in_specs=[_rows(2 * F), _scales(2 * F), _rows(F), row],
        out_specs=[_rows(2 * F), _rows(F), row],
        out_shape=out, cost_estimate=cost.swiglu_backward(inputs, out),
        interpret=interpret, name="swiglu_backward", compiler_params=_PARAMS,
    )(*inputs)  # fmt: skip
    return d, h, dweight[0]
