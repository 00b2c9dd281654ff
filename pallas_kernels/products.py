"""Matrix products that are as precise as their operands: every product of both packages that XLA multiplies.

XLA's own default depends on the device: float32 operands are rounded to bfloat16 on TPUs and to TF32 (10 bits) on GPUs; only a
CPU multiplies them as they are. Here the dtype is the promise. Whoever wants a fast product casts its operands, as a recipe's
`dtype` does; a float32 product, such as the router's, is one of float32 numbers on every device. The gradients that JAX
derives keep the precision of the product that they are of.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def precision_of(*operands: Any) -> lax.Precision | None:
    """HIGHEST for a product of float32 numbers; None, one pass in the operands' own dtype, for narrower ones."""
    return lax.Precision.HIGHEST if jnp.result_type(*operands) == jnp.float32 else None


def dot_general(a: Any, b: Any, dims: Any, dtype: Any = None) -> jax.Array:
    """`lax.dot_general` with the precision of its operands; `dtype` is that of the sums and of the result."""
    return lax.dot_general(a, b, dims, precision=precision_of(a, b), preferred_element_type=dtype)


def dot(a: Any, b: Any, dtype: Any = None) -> jax.Array:
    """`jnp.dot` with the precision of its operands; `dtype` is that of the sums and of the result."""
    return jnp.dot(a, b, precision=precision_of(a, b), preferred_element_type=dtype)


def einsum(subscripts: str, a: Any, b: Any, dtype: Any = None) -> jax.Array:
    """`jnp.einsum` of two operands with their precision; `dtype` is that of the sums and of the result."""
    return jnp.einsum(subscripts, a, b, precision=precision_of(a, b), preferred_element_type=dtype)


def as_precise_as_operands(kernel: Callable, *operands: Any) -> Callable:
    """`kernel`, of arrays only, for a kernel of JAX's that takes no precision: all of its products have that of `operands`.

    A setting of JAX holds while something is traced, and a kernel's backward pass is traced later than the kernel.
    """
    if precision_of(*operands) is None:
        return kernel

    def highest(f: Callable) -> Callable:
        def traced(*arguments):
            with jax.default_matmul_precision("highest"):
                return f(*arguments)

        return traced

    precise = jax.custom_vjp(highest(kernel))
    precise.defvjp(highest(lambda *arrays: jax.vjp(kernel, *arrays)), highest(lambda pull_back, dy: pull_back(dy)))
    return precise
