"""Products with integer weights on CPUs: a C++ kernel as a custom call, which reads codes and scales once, in place."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.errors import Unavailable
from pallas_kernels.integer_linear.build import target
from pallas_kernels.integer_weight import IntegerWeight

ROWS = 8  # most that it takes: with more of them the weights are worth being made dense


def _take(operation: str, rows: int, *weights: IntegerWeight) -> None:
    """Raises `Unavailable` for arguments that the kernel does not take."""
    if rows > ROWS:
        raise Unavailable(f"{operation}: the cpu kernel takes at most {ROWS} rows, not {rows}; use xla")
    for w in weights:
        if w.format.group % w.format.codes_per_byte:
            raise Unavailable(
                f"{operation}: the cpu kernel takes groups of whole bytes, not of {w.format.group} inputs; use xla"
            )


def _arrays(w: IntegerWeight) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes, scales, and zero points, of which symmetric codes have none."""
    return w.codes, w.scale, jnp.zeros(0, jnp.uint8) if w.zero is None else w.zero


def integer_linear(x_TK: jax.Array, w: IntegerWeight, flags: tuple[str, ...] | None = None) -> jax.Array:
    """See `api.integer_linear`. `flags` are the compiler's for a processor instead of this one's."""
    T = x_TK.shape[0]
    _take("integer_linear", T, w)
    outputs = w.shape[len(w.inputs) :]
    call = jax.ffi.ffi_call(target("linear", flags), jax.ShapeDtypeStruct((T, math.prod(outputs)), jnp.float32))
    y_TX = call(x_TK.astype(jnp.float32), *_arrays(w), bits=np.int64(w.format.bits))
    return y_TX.reshape(T, *outputs).astype(x_TK.dtype)


def integer_experts(
    x_TD: jax.Array, w_gate_up_ED2M: IntegerWeight, w_down_EMD: IntegerWeight, expert_TK: jax.Array, weight_TK: jax.Array,
    flags: tuple[str, ...] | None = None,
) -> jax.Array:  # fmt: skip
    """See `api.integer_experts`. `flags` as in `integer_linear`."""
    _take("integer_experts", x_TD.shape[0], w_gate_up_ED2M, w_down_EMD)
    call = jax.ffi.ffi_call(target("experts", flags), jax.ShapeDtypeStruct(x_TD.shape, jnp.float32))
    y_TD = call(
        x_TD.astype(jnp.float32), *_arrays(w_gate_up_ED2M), *_arrays(w_down_EMD), expert_TK.astype(jnp.int32),
        weight_TK.astype(jnp.float32), bits=np.int64(w_gate_up_ED2M.format.bits), down_bits=np.int64(w_down_EMD.format.bits),
    )  # fmt: skip
    return y_TD.astype(x_TD.dtype)
