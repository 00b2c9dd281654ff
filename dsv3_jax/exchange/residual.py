"""Error feedback: what rounding has cost an array so far and was not yet sent (arXiv 1901.09847)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dsv3_jax.exchange.wire import split_axis


class Residual[T](NamedTuple):
    """What rounding has cost an array and was not yet sent; each in the array's axes, so that any mesh can hold it.

    T is Array, or what describes one: its shape, its sharding. Checkpoints store the fields under these names.
    """

    worker: T  # of this replica's gradients, in their shape
    server: T | None  # of the mean of its share: the array cut along `split_axis`; None if it has none, and `worker` has it


def zero_residual(shape: tuple[int, ...], replicas: int, dtype: jnp.dtype) -> Residual[Array]:
    """The residual of one replica before the first exchange of an array of `shape`."""
    axis = split_axis(shape, replicas)
    if axis is None:
        return Residual(jnp.zeros(shape, dtype), None)
    share = tuple(size // replicas if i == axis else size for i, size in enumerate(shape))
    return Residual(jnp.zeros(shape, dtype), jnp.zeros(share, dtype))


def refit_residual(stored: Residual[jax.Array] | None, wanted: Residual[jax.ShapeDtypeStruct]) -> Residual[jax.Array]:
    """A residual of R replicas as that of R' replicas, in the shapes and shardings of `wanted`.

    Args:
        stored: worker f32[R, ...] of all replicas, and server; None is zero.
        wanted: worker f32[R', ...] and server, abstract, with shardings.

    Returns: `stored` itself where shapes agree. Else each new replica has an equal part, such that the sum over all replicas
    stays what it was; that includes the servers' part where `wanted` has no server.
    """
    if stored is not None and jax.tree.map(jnp.shape, stored) == jax.tree.map(jnp.shape, wanted):
        return stored
    shardings = jax.tree.map(lambda a: a.sharding, wanted)
    if stored is None:
        return jax.jit(lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), wanted), out_shardings=shardings)()
    before, after = stored.worker.shape[0], wanted.worker.shape[0]

    def refit(stored: Residual[jax.Array]) -> Residual[jax.Array]:
        each, server = stored.worker.sum(0, keepdims=True) / after, stored.server
        # a replica's gradients are sums over its rows: with fewer replicas each has more rows, and their mean is as much larger
        server = jnp.zeros(each.shape[1:], each.dtype) if server is None else server * (before / after)
        if wanted.server is None:
            each, server = each + server, None
        return Residual(jnp.broadcast_to(each, wanted.worker.shape), server)

    return jax.jit(refit, out_shardings=shardings)(stored)
