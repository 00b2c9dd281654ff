"""Products of block-scaled matrices, summed in float32 (arXiv 2412.19437, section 3.3.2): of two, or one for each group."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import registry
from pallas_kernels.scaled import TILE, Scaled
from pallas_kernels.scaled_matmul import hopper, reference, tpu

for _name, _module in (("reference", reference), ("xla", reference), ("tpu", tpu), ("hopper", hopper)):
    registry.register("scaled_matmul", _name, _module.scaled_matmul)
    registry.register("grouped_scaled_matmul", _name, _module.grouped_scaled_matmul)
    registry.register("grouped_scaled_wgrad", _name, _module.grouped_scaled_wgrad)


def scaled_matmul(
    a: Scaled,
    b: Scaled,
    dtype: jnp.dtype = jnp.dtype("float32"),  # noqa: B008  (immutable)
    implementation: str = "auto",
    interpret: Any = None,
) -> Float[Array, "M N"]:
    """y[m, n] = sum_k a[m, k] b[n, k] of a: [M, K] and b: [N, K], each with scales of any kind, summed in float32.

    Both operands have the sum's axis last, which is how tensor cores take 8-bit operands. The three products of a linear
    layer y = x w are: forward, tiles of x and blocks of w^T; dgrad, tiles of dy and blocks of w; wgrad, tiles of x^T and
    of dy^T, which share a scale along tokens. int8 operands are summed in int32 within a tile. Implementations as in
    `registry`; `xla` is the definition, and `hopper` does not take int8.
    """
    assert a.values.shape[1] == b.values.shape[1], f"{a.values.shape} and {b.values.shape} differ in what is summed over"
    return registry.run("scaled_matmul", implementation, (a, b, dtype), interpret)


def grouped_scaled_matmul(
    a: Scaled,
    b: Scaled,
    group_b: Int[Array, " blocks"],
    N: int,
    dtype: jnp.dtype = jnp.dtype("float32"),  # noqa: B008  (immutable)
    implementation: str = "auto",
    interpret: Any = None,
) -> Float[Array, "P N"]:
    """y[p] = a[p] b_g^T for rows p of block p // 128, whose group is g = group_b[p // 128]; routed experts are groups.

    a: [P, K], each group's rows filled up to blocks of 128; b: [groups * N, K], the groups' matrices one below the other;
    N a multiple of 128. Groups ascend; blocks that are not there come last, as group `groups`, and what stands in their rows is
    undefined. Forward, tiles of x and blocks of w^T; dgrad, tiles of dy and blocks of w. Otherwise as `scaled_matmul`.
    """
    assert a.values.shape == (TILE * group_b.size, b.values.shape[1]), f"{a.values.shape} for {group_b.size} blocks"
    assert N % TILE == 0, f"N={N} is no multiple of {TILE}"
    return registry.run("grouped_scaled_matmul", implementation, (a, b, group_b, N, dtype), interpret)


def grouped_scaled_wgrad(
    a: Scaled,
    b: Scaled,
    group_b: Int[Array, " blocks"],
    groups: int,
    dtype: jnp.dtype = jnp.dtype("float32"),  # noqa: B008  (immutable)
    implementation: str = "auto",
    interpret: Any = None,
) -> Float[Array, "groups A B"]:
    """y[g] = sum over the blocks i of group g of a[:, i] b[:, i]^T, summed in float32; zero for a group without blocks.

    a: [A, P] and b: [B, P], tiles of x^T and of dy^T: a block is 128 of the P rows, which share a scale. A and B are multiples
    of 128; `group_b` and the rest as in `grouped_scaled_matmul`. Blocks that are not there are not read.
    """
    assert a.values.shape[1] == b.values.shape[1] == TILE * group_b.size, (
        f"{a.values.shape}, {b.values.shape}, {group_b.size} blocks"
    )
    return registry.run("grouped_scaled_wgrad", implementation, (a, b, group_b, groups, dtype), interpret)
