"""Cases of `integer_linear` and `integer_experts`: every number of bits, sizes that fill no vector, nobody's choices."""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import registry
from pallas_kernels.grouped_swiglu.cases import experts_case
from pallas_kernels.integer_weight import IntegerFormat, IntegerWeight, pack, storable
from pallas_kernels.measure import Case, Suite, Tolerance, normal

_F32 = Tolerance("float32 sums in another order", of_largest=3e-6)
_BF16 = Tolerance("the definition rounds weights to bfloat16, a kernel may not", norm=6e-3)


def random_weight(
    seed: int, format: IntegerFormat, lead: tuple[int, ...], inputs: tuple[int, ...], outputs: tuple[int, ...]
) -> IntegerWeight:
    """Codes, scales and zero points at random; the weights' deviation is about 1 / sqrt(inputs)."""
    random, K = np.random.default_rng(seed), int(np.prod(inputs))
    format = format.of(K)
    codes = jnp.asarray(random.integers(0, format.levels, (*lead, K, *outputs), np.uint8))
    groups = (*lead, K // format.group, *outputs)
    scale = storable(jnp.asarray(random.uniform(1, 3, groups) / (format.levels * K**0.5), jnp.float32))
    zero = None if format.symmetric else jnp.asarray(random.integers(0, format.levels, groups, np.uint8))
    return IntegerWeight(pack(codes, format.bits, -1 - len(outputs)), scale, zero, format, inputs, len(outputs))


def _linear_arguments(T: int, inputs: tuple[int, ...], outputs: tuple[int, ...], format: IntegerFormat, dtype: str) -> tuple:
    x = normal(T, T, int(np.prod(inputs)), dtype=dtype) + 0.5  # zero points matter
    w = random_weight(T, format, (), inputs, outputs)
    return x.astype(dtype), w.side_by_side() if T % 2 else w


def _linear(implementation: str, interpret: Any, *arguments) -> dict[str, jax.Array]:
    return {"y": registry.run("integer_linear", implementation, arguments, interpret)}


W4, W8, W2 = IntegerFormat(4, 128), IntegerFormat(8, 128), IntegerFormat(2, 32, symmetric=False)
LINEAR = Suite(
    {
        f"{T} rows {inputs}x{outputs}, {format.bits} bits, groups of {format.group}, {dtype}": Case(
            functools.partial(_linear_arguments, T, inputs, outputs, format, dtype),
            {"y": _F32 if dtype == "float32" else _BF16},
        )
        for T, inputs, outputs, format, dtype in (
            (1, (256,), (192,), W4, "float32"),
            (1, (2, 128), (83,), W4, "float32"),
            (7, (128,), (2, 72), replace(W4, group=32, symmetric=False), "float32"),
            (8, (256,), (128,), W8, "float32"),
            (3, (64,), (100,), replace(W8, symmetric=False), "float32"),
            (2, (128,), (144,), W2, "float32"),
            (1, (256,), (128,), W4, "bfloat16"),
            (20, (256,), (128,), W4, "float32"),
        )
    },
    _linear,
)


def _experts_arguments(
    T: int, D: int, M: int, E: int, K: int, gate_up: IntegerFormat, down: IntegerFormat, dtype: str
) -> tuple:
    """Arguments of `integer_experts`; the first choice of the first token is nobody's."""
    choice, (x, *_, weight) = experts_case(T, D, M, E, K, 0.0, seed=T)
    choice = choice.at[0, 0].set(E)
    w_gate_up = random_weight(T, gate_up, (E,), (D,), (2, M))
    w_gate_up = w_gate_up.side_by_side() if T % 2 else w_gate_up
    return x.astype(dtype), w_gate_up, random_weight(T + 1, down, (E,), (M,), (D,)), choice, weight


def _experts(implementation: str, interpret: Any, *arguments) -> dict[str, jax.Array]:
    return {"y": registry.run("integer_experts", implementation, arguments, interpret)}


EXPERTS = Suite(
    {
        f"{T} tokens {D}x{M}, {E} experts, {K} choices, {gate_up.bits} bits, {dtype}": Case(
            functools.partial(_experts_arguments, T, D, M, E, K, gate_up, down, dtype),
            {"y": _F32 if dtype == "float32" else _BF16},
        )
        for T, D, M, E, K, gate_up, down, dtype in (
            (1, 256, 128, 16, 4, W4, W4, "float32"),
            (5, 128, 160, 4, 2, W4, replace(W4, group=32, symmetric=False), "float32"),
            (2, 96, 64, 8, 3, W2, W8, "float32"),
            (1, 128, 128, 8, 2, W4, W4, "bfloat16"),
            (40, 128, 64, 4, 2, W4, W4, "float32"),
        )
    },
    _experts,
)
