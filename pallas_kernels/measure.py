"""Comparison of an implementation's results with those of an operation's definition."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Tolerance:
    """The error that a result may have: for each number, relative * |expected| + absolute + of_largest * scale.

    `scale` is the largest magnitude that is expected, or `floor` where that is more. Where a number expected is not finite, the
    one found is not either.
    """

    why: str
    relative: float = 0.0
    absolute: float = 0.0
    of_largest: float = 0.0
    floor: float = 0.0
    differing: float = 0.0  # fraction of the numbers that may be further off
    norm: float | None = None  # instead of all that: of the difference, over that of what is expected


EXACT = Tolerance("the same operations in the same order")


@dataclass(frozen=True)
class Case:
    """Arguments of an operation, made when they are needed, and the tolerance of each result by name."""

    arguments: Callable[[], tuple]
    tolerances: dict[str, Tolerance]


@dataclass(frozen=True)
class Suite:
    """The cases of an operation.

    `results(implementation, interpret, *arguments)` gives by name the arrays that are compared; it is run under jit.
    `expected(*arguments)` gives what they should be where that is not `results` of "reference"; float64 there is of any dtype.
    """

    cases: dict[str, Case]
    results: Callable[..., dict[str, Any]]
    expected: Callable[..., dict[str, Any]] | None = None


def normal(seed: int, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def with_gradients(function: Callable, arguments: tuple, names: dict[int, str]) -> dict[str, Any]:
    """The result as `out`, and by name the gradients of the sum of its sines by some of the arguments (by position)."""

    def total(*arguments):
        out = function(*arguments)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

    (_, out), gradients = jax.value_and_grad(total, tuple(names), has_aux=True)(*arguments)
    return {"out": out} | dict(zip(names.values(), gradients, strict=True))


def compare(what: str, found: dict[str, Any], expected: dict[str, Any], tolerances: dict[str, Tolerance]) -> None:
    """Raises `AssertionError`, which names the result and its worst number, where one is beyond its tolerance."""
    for name, tolerance in tolerances.items():
        a, b = found[name], expected[name]
        assert a.shape == b.shape, f"{what}: {name} has shape {a.shape}, not {b.shape}"
        assert b.dtype in (a.dtype, np.float64), f"{what}: {name} is {a.dtype}, not {b.dtype}"
        a, b = (np.asarray(x).astype(np.float64) for x in (a, b))
        finite = np.isfinite(b)
        assert (np.isfinite(a) == finite).all(), f"{what}: {name} is finite at other places than the definition's"
        error, scale = np.abs(a - b)[finite], np.abs(b[finite])
        if not error.size:
            continue
        if tolerance.norm is not None:
            relative = np.linalg.norm(error) / np.linalg.norm(scale)
            assert relative <= tolerance.norm, f"{what}: {name} differs by {relative:.2g} in norm, more than {tolerance.norm}"
            continue
        bound = tolerance.relative * scale + tolerance.absolute + tolerance.of_largest * max(scale.max(), tolerance.floor)
        beyond = error > bound
        worst = int(np.argmax(error - bound))
        assert beyond.mean() <= tolerance.differing, (
            f"{what}: {name} differs in {beyond.sum()} of {error.size} numbers, at worst by {error[worst]:.3g} from "
            f"{b[finite][worst]:.6g} where {bound[worst]:.3g} is allowed ({tolerance.why})"
        )
