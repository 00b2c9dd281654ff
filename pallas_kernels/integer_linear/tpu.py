"""Products with integer weights for TPU (Mosaic): codes are read in 4 or 8 bits and become numbers in the core's own memory."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import cost
from pallas_kernels.errors import Unavailable
from pallas_kernels.integer_linear.cpu import ROWS
from pallas_kernels.integer_weight import IntegerWeight
from pallas_kernels.products import dot_general

_BLOCK = 2**20  # bytes of codes in a program, at most: two such blocks are in a core's memory at a time
_SIGNED = {4: (0x88, jnp.int4), 8: (0x80, jnp.int8)}  # flips the codes' highest bits: code - 2^(bits-1) as a signed number


def _numbers(bits_ref, rows: slice) -> jax.Array:
    """float16 read as its 16 bits, as float32: TPUs have no float16."""
    bits = bits_ref[rows].astype(jnp.int32)
    exponent, mantissa = bits >> 10 & 31, bits & 1023
    power = jax.lax.bitcast_convert_type((jnp.maximum(exponent, 1) + 102) << 23, jnp.float32)
    return (mantissa + jnp.where(exponent > 0, 1024, 0)).astype(jnp.float32) * power


def _kernel(expert_ref, x_ref, codes_ref, scale_ref, *rest, bits: int, group: int):
    """One expert's product of its rows with a block of outputs, group by group of inputs."""
    del expert_ref
    *zero_ref, y_ref = rest
    flip, signed = _SIGNED[bits]
    stored = group * bits // 8
    y = jnp.zeros(y_ref.shape, jnp.float32)
    for g in range(scale_ref.shape[0]):
        x = x_ref[:, g * group : (g + 1) * group]
        codes = pltpu.bitcast(codes_ref[g * stored : (g + 1) * stored] ^ jnp.uint8(flip), signed)
        part = dot_general(x, codes.astype(x.dtype), (((1,), (0,)), ((), ())), dtype=jnp.float32)
        if zero_ref:
            off = zero_ref[0][g : g + 1].astype(jnp.int32).astype(jnp.float32) - 2 ** (bits - 1)
            part -= off * jnp.sum(x.astype(jnp.float32), axis=1, keepdims=True)
        y += part * _numbers(scale_ref, slice(g, g + 1))
    y_ref[...] = y


def _block(K: int, N: int, bits: int) -> int:
    """Outputs of a program: all, or a multiple of 128."""
    most = max(_BLOCK // (K * bits // 8) // 128, 1) * 128
    return N if most >= N else most


def _products(operation: str, rows: int, x_SRK, w: IntegerWeight, expert_S, interpret: bool) -> jax.Array:
    """f32[S, R, N]: rows R of slot s times the matrix [K, N] of its expert.

    Raises `Unavailable` for what the kernel does not take; `rows` are those of the operation.
    """
    S, R, K = x_SRK.shape
    bits, group = w.format.bits, w.format.group
    if rows > ROWS:
        raise Unavailable(f"{operation}: the tpu kernel takes at most {ROWS} rows, not {rows}; use xla")
    if bits not in _SIGNED or group % 64 or K % 128:
        raise Unavailable(f"{operation}: the tpu kernel takes 4 or 8 bits and groups of 64 inputs, not {w.format}; use xla")
    E, N = w.codes.shape[0], math.prod(w.codes.shape[2:])
    block = _block(K, N, bits)

    def matrix(a: jax.Array) -> tuple[jax.Array, pl.BlockSpec]:
        a = a.reshape(E, a.shape[1], N)
        return a, pl.BlockSpec((None, a.shape[1], block), lambda s, n, expert_S: (expert_S[s], 0, n))

    scale = jax.lax.bitcast_convert_type(w.scale, jnp.int16)
    arrays, specs = zip(*(matrix(a) for a in (w.codes, scale, w.zero) if a is not None), strict=True)
    out = jax.ShapeDtypeStruct((S, R, N), jnp.float32)
    return pl.pallas_call(
        functools.partial(_kernel, bits=bits, group=group),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(S, pl.cdiv(N, block)),
            in_specs=[pl.BlockSpec((None, R, K), lambda s, n, expert_S: (s, 0, 0)), *specs],
            out_specs=pl.BlockSpec((None, R, block), lambda s, n, expert_S: (s, 0, n)),
        ),
        out_shape=out,
        cost_estimate=cost.integer_product(x_SRK, [a[:1] for a in arrays], out),
        interpret=interpret,
        name=operation,
    )(jnp.minimum(expert_S, E - 1).astype(jnp.int32), x_SRK, *arrays)


def integer_linear(x_TK: jax.Array, w: IntegerWeight, interpret: bool = False) -> jax.Array:
    """See `api.integer_linear`."""
    one = jax.tree.map(lambda a: a[None], w)
    y_1TX = _products("integer_linear", x_TK.shape[0], x_TK[None], one, jnp.zeros(1, jnp.int32), interpret)
    return y_1TX.reshape(x_TK.shape[0], *w.shape[len(w.inputs) :]).astype(x_TK.dtype)


def integer_experts(x_TD, w_gate_up_ED2M, w_down_EMD, expert_TK, weight_TK, interpret: bool = False) -> jax.Array:
    """See `api.integer_experts`. S slots (token, choice), each with its expert's weights."""
    (T, D), K, (E, M, _) = x_TD.shape, expert_TK.shape[1], w_down_EMD.shape
    expert_S, product = expert_TK.reshape(-1), functools.partial(_products, "integer_experts", T, interpret=interpret)
    gate_up_SX = product(jnp.repeat(x_TD, K, axis=0)[:, None], w_gate_up_ED2M, expert_S)
    gate_SM, up_SM = gate_up_SX.reshape(T * K, 2, M).swapaxes(0, 1)
    weight_S = jnp.where(expert_S < E, weight_TK.reshape(-1), 0)
    h_SM = (jax.nn.silu(gate_SM) * up_SM * weight_S[:, None]).astype(x_TD.dtype)
    return product(h_SM[:, None], w_down_EMD, expert_S).reshape(T, K, D).sum(1).astype(x_TD.dtype)
