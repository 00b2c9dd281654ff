"""Cases of the products of scaled matrices, against sums in float64 of the numbers that the operands stand for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import registry
from pallas_kernels.measure import Case, Suite, Tolerance, normal
from pallas_kernels.quantize import reference
from pallas_kernels.scaled import TILE, Scaled, dequantize

SUMS = Tolerance("float32 sums in another order, of up to 384 terms", of_largest=2e-6)
HALF = Tolerance("a result in bfloat16 has 8 bits", of_largest=4e-3)


def _wide(x: Scaled) -> np.ndarray:
    return np.asarray(dequantize(x), np.float64)


def _results(operation, implementation, interpret, *arguments):
    y = registry.run(operation, implementation, arguments, interpret)
    assert y.dtype == arguments[-1]
    return {"y": y}


def _product_cases() -> dict[str, Case]:
    def arguments(M, N, K, rows, format, dtype):
        a, b = reference.quantize(normal(3, M, K), 1, format, False), reference.quantize(normal(4, N, K), rows, format, False)
        return a, b, jnp.dtype(dtype)

    cases = {
        f"e4m3 {M}x{K}x{N}, scales of {rows} rows, {dtype}": Case(
            functools.partial(arguments, M, N, K, rows, "e4m3", dtype), {"y": SUMS if dtype == "float32" else HALF}
        )
        for M, N, K in ((256, 128, 384), (100, 70, 130), (3, 200, 40))
        for rows in (1, 128)
        for dtype in ("float32", "bfloat16")
    }
    return cases | {"int8 100x130x70": Case(functools.partial(arguments, 100, 70, 130, 128, "int8", "float32"), {"y": SUMS})}


def _grouped_cases() -> dict[str, Case]:
    """Groups in any order, with several blocks or none."""
    N, K, E = 256, 130, 3

    def arguments(groups):
        a = reference.quantize(normal(3, TILE * len(groups), K), 1, "e4m3", False)
        b = jax.vmap(lambda w: reference.quantize(w, TILE, "e4m3", False))(normal(4, E, N, K))
        b = Scaled(b.values.reshape(E * N, K), jnp.moveaxis(b.scales, 0, 1).reshape(b.scales.shape[1], -1))
        return a, b, jnp.array(groups, jnp.int32), N, jnp.dtype("float32")

    return {
        f"groups {groups}": Case(functools.partial(arguments, groups), {f"block {i}": SUMS for i in range(len(groups))})
        for groups in ((2, 0, 2), (1,))
    }


def _grouped_results(implementation, interpret, *arguments):
    y_PN = registry.run("grouped_scaled_matmul", implementation, arguments, interpret)
    return {f"block {i}": y for i, y in enumerate(y_PN.reshape(-1, TILE, y_PN.shape[1]))}


def _grouped_expected(a, b, group_b, N, dtype):
    blocks, matrices = _wide(a).reshape(len(group_b), TILE, -1), _wide(b).reshape(-1, N, b.values.shape[1])
    return {f"block {i}": block @ matrices[g].T for i, (block, g) in enumerate(zip(blocks, group_b, strict=True))}


def _wgrad_arguments():
    """Groups of two blocks, none, and one; a block that is not there counts for nothing."""
    a, b = (reference.quantize(normal(i, size, 640), 1, "e4m3", False) for i, size in enumerate((128, 256)))
    return a, b, jnp.array([0, 0, 2, 3, 4], jnp.int32), 4, jnp.dtype("float32")


def _wgrad_expected(a, b, group_b, groups, dtype):
    y_GAB = np.zeros((groups, a.values.shape[0], b.values.shape[0]))
    for block, g in enumerate(np.asarray(group_b)):
        if g < groups:
            at = slice(block * TILE, (block + 1) * TILE)
            y_GAB[g] += _wide(a)[:, at] @ _wide(b)[:, at].T
    return {"y": y_GAB}


PRODUCT = Suite(
    _product_cases(), functools.partial(_results, "scaled_matmul"), lambda a, b, dtype: {"y": _wide(a) @ _wide(b).T}
)
GROUPED = Suite(_grouped_cases(), _grouped_results, _grouped_expected)
WGRAD = Suite(
    {"groups [0, 0, 2, 3, nobody]": Case(_wgrad_arguments, {"y": SUMS})}, functools.partial(_results, "grouped_scaled_wgrad"),
    _wgrad_expected,
)  # fmt: skip
