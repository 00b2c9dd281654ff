"""Cases of `grouped_swiglu`, forward and backward: empty and hot experts, sizes that fill no tile, slots without an expert."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import registry
from pallas_kernels.measure import EXACT, Case, Suite, Tolerance, normal, with_gradients

_GRADIENTS = {0: "dx", 1: "dw_gate_up", 2: "dw_down", 4: "dweight"}
_EVERY = 5  # tokens: one of so many has no expert
F32 = dict.fromkeys(
    ("out", *_GRADIENTS.values()), Tolerance("float32 sums in another order", relative=1e-4, of_largest=1e-4, floor=0.05)
) | {"dx of nobody's": EXACT, "dweight of nobody's": EXACT}
BF16 = {"out": Tolerance("a few roundings of 2^-9 each", norm=0.01)}


def experts_case(
    T: int, D: int, M: int, E: int, K: int, skew: float, seed: int, dtype=jnp.float32
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """(choices, (x, w_gate_up, w_down, weight)): experts' loads from even (skew 0) to everything on the last K."""
    choice = jax.lax.top_k(normal(seed + 4, T, E) + skew * jnp.arange(E), K)[1]
    arrays = (
        normal(seed, T, D, dtype=dtype), normal(seed + 1, E, D, 2, M, dtype=dtype), normal(seed + 2, E, M, D, dtype=dtype),
        jax.random.uniform(jax.random.key(seed + 3), (T, K)),
    )  # fmt: skip
    return choice, arrays


def _arguments(T, D, M, E, K, skew, dtype="float32"):
    choice, (x, w_gate_up, w_down, weight) = experts_case(T, D, M, E, K, skew, T + D, dtype)
    choice = jnp.where((jnp.arange(T) % _EVERY == 0)[:, None], E, choice)
    # sums of order 1, whose sine (see `with_gradients`) is no chaos
    return (x / D).astype(dtype), w_gate_up, w_down, choice, weight


def _results(implementation, interpret, *arguments):
    def run(*arguments):
        return registry.run("grouped_swiglu", implementation, arguments, interpret)

    found = with_gradients(run, arguments, _GRADIENTS)
    assert found["out"].dtype == arguments[0].dtype
    return found | {"dx of nobody's": found["dx"][::_EVERY], "dweight of nobody's": found["dweight"][::_EVERY]}


def _expected(*arguments):
    """The definition's results, computed in float32 whatever the dtype."""
    wide = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, arguments)
    found = jax.device_get(jax.jit(functools.partial(_results, "reference", None))(*wide))
    return {name: array.astype("float64") for name, array in found.items()}


GROUPED_SWIGLU = Suite(
    {
        f"{T} tokens {D}x{M}, {E} experts, {K} choices{', one hot' if skew else ''}": Case(
            functools.partial(_arguments, T, D, M, E, K, skew), F32
        )
        for T, D, M, E, K, skew in (
            (7, 16, 8, 4, 2, 0.0),
            (130, 3, 5, 5, 2, 0.0),
            (300, 200, 70, 4, 1, 0.0),
            (600, 130, 40, 3, 2, 100.0),
        )
    }
    | {"bfloat16": Case(functools.partial(_arguments, 256, 16, 16, 4, 2, 0.0, "bfloat16"), BF16)},
    _results,
    _expected,
)
