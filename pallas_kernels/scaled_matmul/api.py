"""The product of two block-scaled matrices, summed in float32 (arXiv 2412.19437, section 3.3.2)."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.scaled import Scaled
from pallas_kernels.scaled_matmul import hopper, reference, tpu


def scaled_matmul(
    a: Scaled,
    b: Scaled,
    dtype: jnp.dtype = jnp.dtype("float32"),  # noqa: B008  (immutable)
    implementation: Literal["auto", "reference", "tpu", "hopper"] = "auto",
    interpret: Any = None,
) -> Float[Array, "M N"]:
    """y[m, n] = sum_k a[m, k] b[n, k] of a: [M, K] and b: [N, K], each with scales of any kind, summed in float32.

    Both operands have the sum's axis last, which is how tensor cores take 8-bit operands. The three products of a linear
    layer y = x w are: forward, tiles of x and blocks of w^T; dgrad, tiles of dy and blocks of w; wgrad, tiles of x^T and
    of dy^T, which share a scale along tokens. int8 operands are summed in int32 within a tile. "auto" as in `quantize`; Hopper
    has no kernel for int8.
    """
    assert a.values.shape[1] == b.values.shape[1], f"{a.values.shape} and {b.values.shape} differ in what is summed over"
    if implementation == "auto":
        cuda = reference if a.values.dtype == jnp.int8 else hopper
        return jax.lax.platform_dependent(
            a, b,
            tpu=lambda a, b: tpu.scaled_matmul(a, b, dtype),
            cuda=lambda a, b: cuda.scaled_matmul(a, b, dtype),
            default=lambda a, b: reference.scaled_matmul(a, b, dtype),
        )  # fmt: skip
    if implementation == "reference":
        return reference.scaled_matmul(a, b, dtype)
    return {"tpu": tpu.scaled_matmul, "hopper": hopper.scaled_matmul}[implementation](a, b, dtype, interpret)
