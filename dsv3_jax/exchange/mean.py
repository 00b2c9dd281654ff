"""Gradients averaged over a slow mesh axis in 1, 2, 4 or 8 bits, what is lost being sent with the next ones.

Each replica adds to its gradients what rounding has cost before (error feedback, arXiv 1901.09847), rounds, and sends every
other replica its share of the codes; who has a share takes the mean, rounds that in the same way (with a residual of its own,
as in 1-bit Adam, arXiv 2102.02888, section 4), and sends the codes to all. So codes and scales are all that crosses the axis,
and every replica decodes the same bytes.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, UInt8

from dsv3_jax.exchange.codec import Codec
from dsv3_jax.exchange.residual import Residual, zero_residual
from dsv3_jax.exchange.wire import Wire, has_shares
from pallas_kernels.gradient_codes.api import mean_of_codes, pack_codes
from pallas_kernels.gradient_codes.reference import TINY

_UNIT_FLOOR = 0.01


class Part(NamedTuple):
    """A replica's array, of which the mean is wanted."""

    x: Float[Array, "..."]
    residual: Residual[Array]
    unit: Float[Array, "..."]  # positive, the same on all replicas, of the shape of x or a number: what x is rounded in


def means_of_codes(
    parts: list[Part], codec: Codec, mesh_axis: str, implementation: str = "auto"
) -> tuple[list[Float[Array, "..."]], list[Residual[Array]]]:
    """The means of arrays over `mesh_axis`, each phase in one message; where mesh axes are manual.

    Args:
        implementation: whose kernels round and read codes (pallas_kernels/gradient_codes).

    Returns: the means as rounded, the same bits on every replica; and the residuals that are left. Summed over steps, the means
    are those of x less the mean of `worker` and less `server`, to float rounding.
    """
    replicas = lax.axis_size(mesh_axis)
    rows = [p if p.residual.server is not None else _flattened(p, replicas) for p in parts]
    means, left = _means_of_shares(rows, codec, mesh_axis, implementation)
    for i, (part, row) in enumerate(zip(parts, rows, strict=True)):
        if part is not row:
            size, residual = part.x.size, _without_server(left[i], mesh_axis)
            means[i] = means[i][:size].reshape(part.x.shape)
            left[i] = Residual(residual.worker[:size].reshape(part.x.shape), None)
    return means, left


def _flattened(part: Part, replicas: int) -> Part:
    """An array of which no axis can be cut, as a vector padded to a multiple of the number of replicas."""
    size = part.x.size
    extra = -size % replicas

    def row(a: Array, fill: float = 0) -> Array:
        return jnp.pad(a.reshape(-1), (0, extra), constant_values=fill)

    worker = part.residual.worker
    residual = Residual(row(worker), jnp.zeros((size + extra) // replicas, worker.dtype))
    return Part(row(part.x), residual, row(jnp.broadcast_to(part.unit, part.x.shape), 1))


def _without_server(residual: Residual[Array], mesh_axis: str) -> Residual[Array]:
    """The residual of such a vector with the server's part in this replica's own, times the number of replicas."""
    assert residual.server is not None
    size = residual.server.size
    at = lax.axis_index(mesh_axis) * size
    own = lax.dynamic_slice_in_dim(residual.worker, at, size) + lax.axis_size(mesh_axis) * residual.server
    return Residual(lax.dynamic_update_slice_in_dim(residual.worker, own, at, 0), None)


def _means_of_shares(
    parts: list[Part], codec: Codec, mesh_axis: str, implementation: str
) -> tuple[list[Float[Array, "..."]], list[Residual[Array]]]:
    """`means_of_codes` of arrays that can be cut into shares: codes to who averages a share, codes of the mean back to all."""
    if not parts:
        return [], []
    replicas = lax.axis_size(mesh_axis)
    wires = [Wire.of(p.x.shape, replicas, codec) for p in parts]
    units = [jnp.broadcast_to(p.unit, p.x.shape) for p in parts]

    def encode(xs: list[Array], residuals: list[Array], units: list[Array]) -> tuple[list[Array], list[Array]]:
        """(messages, new residuals) of arrays, or of a share of each."""
        messages, left = [], []
        for wire, x, e, unit in zip(wires, xs, residuals, units, strict=True):
            numbers, before = wire.to_blocks(x.astype(jnp.float32)), wire.to_blocks(e.astype(jnp.float32))
            codes, scales, remainder = pack_codes(numbers, before, wire.to_blocks(unit, 1), wire.codec.table, implementation)
            messages.append(wire.message(codes, scales))
            left.append(wire.from_blocks(remainder, messages[-1].shape[0]).astype(e.dtype))
        return messages, left

    def decode(wire: Wire, codes_and_scales: tuple[Array, Array], shares: int) -> Array:
        """The mean over the first axis of what codes stand for."""
        return wire.from_blocks(mean_of_codes(*codes_and_scales, wire.codec.table, implementation), shares)

    sent, worker = encode([p.x for p in parts], [p.residual.worker for p in parts], units)
    received = _split(lax.all_to_all(_concatenate(sent), mesh_axis, 0, 0), wires)
    own_units = [wire.own_share(unit, mesh_axis) for wire, unit in zip(wires, units, strict=True)]
    shares = [decode(wire, wire.read(r), 1) * unit for wire, r, unit in zip(wires, received, own_units, strict=True)]
    sent, server = encode(shares, [p.residual.server for p in parts if p.residual.server is not None], own_units)
    gathered = _split(lax.all_gather(_concatenate(sent), mesh_axis, tiled=True), wires)
    means = [decode(wire, wire.read_in_order(g), replicas) * unit for wire, g, unit in zip(wires, gathered, units, strict=True)]
    return means, [Residual(w, s) for w, s in zip(worker, server, strict=True)]


def _concatenate(messages: list[UInt8[Array, "shares _"]]) -> UInt8[Array, "shares bytes"]:
    return jnp.concatenate(messages, 1)


def _split(joined: UInt8[Array, "shares bytes"], wires: list[Wire]) -> list[UInt8[Array, "shares _"]]:
    ends = np.cumsum([wire.share_bytes for wire in wires])[:-1].tolist()
    return jnp.split(joined, ends, 1)


def second_moment_units(v: Float[Array, "..."]) -> Float[Array, "..."]:
    """Units to round gradients in, from Adam's second moment v: its root, which is what Adam divides by.

    Without units the small numbers of a block would become nothing but the rounding noise of its large ones. A part of the
    array's own mean keeps numbers whose v is still zero from drowning the others of their block.
    """
    v = v.astype(jnp.float32)
    return jnp.sqrt(v) + _UNIT_FLOOR * jnp.sqrt(v.mean()) + TINY


class CompressedMeanState(NamedTuple):
    residuals: Any  # in the tree of the updates: `Residual`, or `optax.MaskedNode` where nothing is kept


def compressed_mean(
    bits: Literal[1, 2, 4, 8] = 2,
    *,
    axis: str = "data",
    block: int = 256,
    levels: Literal["gaussian", "uniform"] = "gaussian",
    error_feedback: bool = True,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    dtype: jnp.dtype = jnp.dtype("float32"),  # noqa: B008  (immutable)
) -> optax.GradientTransformationExtraArgs:
    """Replaces each replica's gradients by their mean over `axis`, sent in `bits`; first in an `optax.chain`.

    For code in which `axis` is manual (`shard_map`): `init` and `update` see one device's shards, and the state is that
    device's. Gradients that are not finite come back as such.

    Args:
        bits, block, levels: see `Codec`, which raises ValueError for what there is not.
        axis: a mesh axis, of replicas.
        error_feedback: whether what rounding costs is kept and sent with the next gradients.
        mask: a tree of booleans or a function of the parameters: what is compressed, all if None. The rest, and what has less
            than 8 numbers for each replica, is averaged in float32.
        dtype: what residuals are kept in; in bfloat16 their own rounding is lost.

    Returns: a transformation whose `update` also takes `units` to round gradients in: a tree of positive arrays, which are the
    same on all replicas, such as `second_moment_units` of Adam's second moment; None is units of 1.
    """
    codec = Codec(bits, block, levels)

    def chosen(tree: Any) -> Any:
        """Whether each leaf is compressed."""
        found = mask(tree) if callable(mask) else mask
        found = jax.tree.map(lambda _: True, tree) if found is None else found
        return jax.tree.map(lambda leaf, yes: bool(yes) and has_shares(leaf.shape, lax.axis_size(axis)), tree, found)

    def first_residual(leaf: Array, compressed: bool) -> Any:
        return zero_residual(leaf.shape, lax.axis_size(axis), dtype) if compressed else optax.MaskedNode()

    def init(params: optax.Params) -> CompressedMeanState:
        if not error_feedback:
            return CompressedMeanState(jax.tree.map(lambda _: optax.MaskedNode(), params))
        return CompressedMeanState(jax.tree.map(first_residual, params, chosen(params)))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, *, units: Any = None, **_: Any
    ) -> tuple[optax.Updates, CompressedMeanState]:
        structure = jax.tree.structure(updates)
        gradients, residuals = jax.tree.leaves(updates), structure.flatten_up_to(state.residuals)
        scales = [jnp.float32(1)] * len(gradients) if units is None else jax.tree.leaves(units)
        compressed: list[bool] = jax.tree.leaves(chosen(updates))
        parts = {
            i: Part(gradients[i], residuals[i] if error_feedback else first_residual(gradients[i], True), scales[i])
            for i, yes in enumerate(compressed)
            if yes
        }
        means, left = means_of_codes(list(parts.values()), codec, axis)
        out = [g if yes else lax.pmean(g.astype(jnp.float32), axis) for g, yes in zip(gradients, compressed, strict=True)]
        for i, mean, residual in zip(parts, means, left, strict=True):
            out[i] = mean
            residuals[i] = residual if error_feedback else residuals[i]
        out = [mean.astype(g.dtype) for mean, g in zip(out, gradients, strict=True)]
        return structure.unflatten(out), CompressedMeanState(structure.unflatten(residuals))

    return optax.GradientTransformationExtraArgs(init, update)
