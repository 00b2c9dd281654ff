"""Gradients averaged over a slow mesh axis in 1, 2, 4 or 8 bits, what is lost being sent with the next ones.

Each replica adds to its gradients what rounding has cost before (error feedback, arXiv 1901.09847), rounds, and sends every
other replica its share of the codes; who has a share takes the mean, rounds that in the same way (its own error, as in 1-bit
Adam, arXiv 2102.02888, section 4), and sends the codes to all. So codes and scales are all that crosses the axis, and every
replica decodes the same bytes.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Shaped, UInt8

from pallas_kernels.gradient_codes.api import mean_of_codes, pack_codes
from pallas_kernels.gradient_codes.reference import TINY, Levels, rounded

_SCALE_BYTES = 4
_SMALLEST_BLOCK = 8  # whose codes of 1 bit are a byte
_LLOYD_STEPS = 2000
_UNIT_FLOOR = 0.01


@functools.cache
def _gaussian_levels(bits: int) -> np.ndarray:
    """The 2^bits numbers that are nearest, in mean square, to a standard normal one (Lloyd, 1982; Max, 1960).

    Each level is the mean of what is rounded to it, which ends midway to its neighbours.
    """
    levels = np.linspace(-2, 2, 2**bits) if bits > 1 else np.array([-1.0, 1.0])

    def density(t: np.ndarray) -> np.ndarray:
        return np.exp(-(t**2) / 2) / math.sqrt(2 * math.pi)

    def below(t: np.ndarray) -> np.ndarray:
        return np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in t])

    for _ in range(_LLOYD_STEPS):
        edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
        levels = -np.diff(density(edges)) / np.diff(below(edges))
    return levels.astype(np.float32)


@dataclass(frozen=True)
class Codec:
    """Numbers as codes of `bits` and a float32 scale for each `block` of them.

    Levels are `gaussian`, the best ones for normal numbers, by a block's root mean square; or `uniform`, from its largest
    magnitude down to minus that. 8 bits are always uniform.
    """

    bits: Literal[1, 2, 4, 8] = 2
    block: int = 256
    levels: Literal["gaussian", "uniform"] = "gaussian"

    def __post_init__(self):
        if self.bits not in (1, 2, 4, 8):
            raise ValueError(f"bits={self.bits}: use 1, 2, 4 or 8")
        if self.block < _SMALLEST_BLOCK or self.block % 8:
            raise ValueError(f"block={self.block}: use a multiple of 8")
        if self.levels not in ("gaussian", "uniform"):
            raise ValueError(f"levels={self.levels!r}: use gaussian or uniform")

    @property
    def block_bytes(self) -> int:
        return self.block * self.bits // 8 + _SCALE_BYTES

    @property
    def table(self) -> Levels:
        """What codes stand for; no level is zero."""
        if self.levels == "gaussian" and self.bits < 8:
            return Levels(tuple(_gaussian_levels(self.bits).tolist()), of_rms=True)
        return Levels(tuple(np.linspace(-1, 1, 2**self.bits).tolist()), of_rms=False)

    def fitted(self, n: int) -> "Codec":
        """With blocks a little smaller, of which a whole number holds n numbers: filling up would make scales too small."""
        blocks = -(-n // self.block)
        return replace(self, block=-(-n // (8 * blocks)) * 8)

    def rounded(self, x: Float[Array, "*rows n"]) -> Float[Array, "*rows n"]:
        """What the codes of x stand for, n being a multiple of `block`. A number that is not finite makes its block so."""
        return rounded(x.reshape(*x.shape[:-1], -1, self.block), self.table).reshape(x.shape)


class Errors[T](NamedTuple):
    """What rounding has cost an array and was not yet sent; each in the array's axes, so that any mesh can hold it.

    T is Array, or what says something of one: its sharding.
    """

    worker: T  # of this replica's gradients, in their shape
    server: T | None  # of the mean of its share: the array cut along `split_axis`; None if it has none, and `worker` has it


def has_shares(shape: tuple[int, ...], replicas: int) -> bool:
    """Whether each replica's share of an array would fill a block."""
    return math.prod(shape) >= replicas * _SMALLEST_BLOCK


def split_axis(shape: tuple[int, ...], replicas: int) -> int | None:
    """The first axis that can be cut into a share for each replica, of runs that fill a block; None if there is none."""

    def fits(axis: int) -> bool:
        return shape[axis] % replicas == 0 and math.prod(shape[axis:]) // replicas >= _SMALLEST_BLOCK

    return next(filter(fits, range(len(shape))), None)


def no_errors(shape: tuple[int, ...], replicas: int, dtype: jnp.dtype) -> Errors[Array]:
    axis = split_axis(shape, replicas)
    if axis is None:
        return Errors(jnp.zeros(shape, dtype), None)
    share = tuple(size // replicas if i == axis else size for i, size in enumerate(shape))
    return Errors(jnp.zeros(shape, dtype), jnp.zeros(share, dtype))


@dataclass(frozen=True)
class Wire:
    """How an array of `shape` travels: in a share for each replica, cut along axis `cut`.

    Each run of a share's numbers that lie together in memory is whole blocks of `codec`, so that only codes ever move.
    """

    shape: tuple[int, ...]
    cut: int
    replicas: int
    codec: Codec

    @classmethod
    def of(cls, shape: tuple[int, ...], replicas: int, codec: Codec) -> "Wire":
        cut = split_axis(shape, replicas)
        assert cut is not None, f"{shape} has no axis to cut in {replicas}"
        return cls(shape, cut, replicas, codec.fitted(math.prod(shape[cut:]) // replicas))

    @property
    def runs(self) -> int:
        """Of a share."""
        return math.prod(self.shape[: self.cut])

    @property
    def run(self) -> int:
        """Numbers of one."""
        return math.prod(self.shape[self.cut :]) // self.replicas

    @property
    def blocks(self) -> int:
        """Of a run."""
        return -(-self.run // self.codec.block)

    @property
    def share_bytes(self) -> int:
        return self.runs * self.blocks * self.codec.block_bytes

    def to_blocks(self, a: Float[Array, "..."], fill: float = 0) -> Float[Array, "rows block"]:
        """Of the array, or of one share of it; the last block of each run is filled up."""
        rows = a.reshape(-1, self.run)
        extra = self.blocks * self.codec.block - self.run
        return jnp.pad(rows, ((0, 0), (0, extra)), constant_values=fill).reshape(-1, self.codec.block)

    def of_blocks(self, rows: Float[Array, "rows block"], shares: int) -> Float[Array, "..."]:
        """The array, or one share of it: `shares` is the number of replicas, or 1."""
        runs = rows.reshape(-1, self.blocks * self.codec.block)[:, : self.run]
        return runs.reshape(
            *self.shape[: self.cut], self.shape[self.cut] // self.replicas * shares, *self.shape[self.cut + 1 :]
        )

    def message(self, codes: UInt8[Array, "rows bytes"], scales: Float[Array, " rows"]) -> UInt8[Array, "shares bytes"]:
        """Of the array's blocks, or of one share's."""

        def by_share(a: UInt8[Array, "rows _"]) -> UInt8[Array, "shares bytes"]:
            of_runs = jnp.moveaxis(a.reshape(self.runs, -1, self.blocks * a.shape[1]), 1, 0)
            return of_runs.reshape(of_runs.shape[0], -1)

        return jnp.concatenate([by_share(codes), by_share(lax.bitcast_convert_type(scales, jnp.uint8))], 1)

    def read(self, sent: UInt8[Array, "shares bytes"]) -> tuple[UInt8[Array, "shares rows bytes"], Float[Array, "shares rows"]]:
        """(codes, scales), a share's blocks being rows."""
        rows = self.runs * self.blocks
        codes, scales = jnp.split(sent, [sent.shape[1] - rows * _SCALE_BYTES], 1)
        shares = sent.shape[0]
        scales = lax.bitcast_convert_type(scales.reshape(shares, rows, _SCALE_BYTES), jnp.float32)
        return codes.reshape(shares, rows, -1), scales

    def read_in_order(self, sent: UInt8[Array, "shares bytes"]) -> tuple[UInt8[Array, "1 all bytes"], Float[Array, "1 all"]]:
        """As `read`, but the blocks of all shares as the array has them."""

        def in_order(a: Shaped[Array, "shares rows ..."]) -> Shaped[Array, "1 all ..."]:
            by_run = a.reshape(a.shape[0], self.runs, self.blocks, *a.shape[2:])
            return jnp.moveaxis(by_run, 0, 1).reshape(1, -1, *a.shape[2:])

        codes, scales = self.read(sent)
        return in_order(codes), in_order(scales)

    def own_share(self, a: Float[Array, "..."], mesh_axis: str) -> Float[Array, "..."]:
        """This replica's share of an array of the shape."""
        size = self.shape[self.cut] // self.replicas
        return lax.dynamic_slice_in_dim(a, lax.axis_index(mesh_axis) * size, size, self.cut)


def _joined(parts: list[UInt8[Array, "shares _"]]) -> UInt8[Array, "shares bytes"]:
    return jnp.concatenate(parts, 1)


def _parted(joined: UInt8[Array, "shares bytes"], wires: list[Wire]) -> list[UInt8[Array, "shares _"]]:
    ends = np.cumsum([wire.share_bytes for wire in wires])[:-1].tolist()
    return jnp.split(joined, ends, 1)


class Part(NamedTuple):
    """A replica's array, of which the mean is wanted."""

    x: Float[Array, "..."]
    errors: Errors[Array]
    unit: Float[Array, "..."]  # positive, the same on all replicas, of the shape of x or a number: what x is rounded in


def _in_a_row(part: Part, replicas: int) -> Part:
    """Of an array that replicas divide no axis of: its numbers, filled up so that they divide these."""
    size = part.x.size
    extra = -size % replicas

    def row(a: Array, fill: float = 0) -> Array:
        return jnp.pad(a.reshape(-1), (0, extra), constant_values=fill)

    errors = Errors(row(part.errors.worker), jnp.zeros((size + extra) // replicas, part.errors.worker.dtype))
    return Part(row(part.x), errors, row(jnp.broadcast_to(part.unit, part.x.shape), 1))


def _without_server(errors: Errors[Array], mesh_axis: str) -> Errors[Array]:
    """Of such a row: what a share's mean owes, its replica owes as one of all."""
    assert errors.server is not None
    size = errors.server.size
    at = lax.axis_index(mesh_axis) * size
    own = lax.dynamic_slice_in_dim(errors.worker, at, size) + lax.axis_size(mesh_axis) * errors.server
    return Errors(lax.dynamic_update_slice_in_dim(errors.worker, own, at, 0), None)


def means_of_codes(
    parts: list[Part], codec: Codec, mesh_axis: str, implementation: str = "auto"
) -> tuple[list[Float[Array, "..."]], list[Errors[Array]]]:
    """(the means over `mesh_axis` as rounded, the same bits on every replica; the errors that are left). Where axes are manual.

    All travel in one message of each phase. Summed over steps, the means given are those of x less the mean of `worker` and
    less `server`, to float rounding. `implementation` is whose kernels round and read codes (pallas_kernels/gradient_codes).
    """
    replicas = lax.axis_size(mesh_axis)
    rows = [p if p.errors.server is not None else _in_a_row(p, replicas) for p in parts]
    means, left = _means_of_shares(rows, codec, mesh_axis, implementation)
    for i, (part, row) in enumerate(zip(parts, rows, strict=True)):
        if part is not row:
            size, owed = part.x.size, _without_server(left[i], mesh_axis)
            means[i] = means[i][:size].reshape(part.x.shape)
            left[i] = Errors(owed.worker[:size].reshape(part.x.shape), None)
    return means, left


def _means_of_shares(
    parts: list[Part], codec: Codec, mesh_axis: str, implementation: str
) -> tuple[list[Float[Array, "..."]], list[Errors[Array]]]:
    if not parts:
        return [], []
    replicas = lax.axis_size(mesh_axis)
    wires = [Wire.of(p.x.shape, replicas, codec) for p in parts]
    units = [jnp.broadcast_to(p.unit, p.x.shape) for p in parts]

    def rounded_parts(xs: list[Array], owed: list[Array], units: list[Array]) -> tuple[list[Array], list[Array]]:
        """(messages, what is owed then), of arrays or of a share of each."""
        messages, left = [], []
        for wire, x, e, unit in zip(wires, xs, owed, units, strict=True):
            numbers, owing = wire.to_blocks(x.astype(jnp.float32)), wire.to_blocks(e.astype(jnp.float32))
            codes, scales, remainder = pack_codes(numbers, owing, wire.to_blocks(unit, 1), wire.codec.table, implementation)
            messages.append(wire.message(codes, scales))
            left.append(wire.of_blocks(remainder, messages[-1].shape[0]).astype(e.dtype))
        return messages, left

    def meant(wire: Wire, codes_and_scales: tuple[Array, Array], shares: int) -> Array:
        return wire.of_blocks(mean_of_codes(*codes_and_scales, wire.codec.table, implementation), shares)

    sent, worker = rounded_parts([p.x for p in parts], [p.errors.worker for p in parts], units)
    received = _parted(lax.all_to_all(_joined(sent), mesh_axis, 0, 0), wires)
    own_units = [wire.own_share(unit, mesh_axis) for wire, unit in zip(wires, units, strict=True)]
    shares = [meant(wire, wire.read(r), 1) * unit for wire, r, unit in zip(wires, received, own_units, strict=True)]
    sent, server = rounded_parts(shares, [p.errors.server for p in parts if p.errors.server is not None], own_units)
    gathered = _parted(lax.all_gather(_joined(sent), mesh_axis, tiled=True), wires)
    means = [meant(wire, wire.read_in_order(g), replicas) * unit for wire, g, unit in zip(wires, gathered, units, strict=True)]
    return means, [Errors(w, s) for w, s in zip(worker, server, strict=True)]


def second_moment_units(v: Float[Array, "..."]) -> Float[Array, "..."]:
    """What Adam divides by, as units of what is rounded: else the noise of large numbers is all that small ones become.

    A part of the array's own mean keeps numbers whose v is zero yet from drowning the others of their block.
    """
    v = v.astype(jnp.float32)
    return jnp.sqrt(v) + _UNIT_FLOOR * jnp.sqrt(v.mean()) + TINY


class CompressedMeanState(NamedTuple):
    errors: Any  # in the tree of the updates: `Errors`, or `optax.MaskedNode` where nothing is kept


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
    device's. `mask`, a tree of booleans or a function of the parameters, says what is compressed (all if None); the rest, and
    what has less than 8 numbers for each replica, is averaged in float32. `dtype` is what errors are kept in; in bfloat16 their
    own rounding is lost. Without `error_feedback` there are none. Gradients that are not finite come back as such.

    `update` takes `units`, a tree of positive arrays, the same on all replicas: what small gradients are small by, such as
    `second_moment_units` of Adam's second moment. Gradients are rounded in them; in units of 1 if there are none.
    """
    codec = Codec(bits, block, levels)

    def chosen(tree: Any) -> Any:
        """Whether each leaf is compressed."""
        found = mask(tree) if callable(mask) else mask
        found = jax.tree.map(lambda _: True, tree) if found is None else found
        return jax.tree.map(lambda leaf, yes: bool(yes) and has_shares(leaf.shape, lax.axis_size(axis)), tree, found)

    def none_yet(leaf: Array, few: bool) -> Any:
        return no_errors(leaf.shape, lax.axis_size(axis), dtype) if few else optax.MaskedNode()

    def init(params: optax.Params) -> CompressedMeanState:
        if not error_feedback:
            return CompressedMeanState(jax.tree.map(lambda _: optax.MaskedNode(), params))
        return CompressedMeanState(jax.tree.map(none_yet, params, chosen(params)))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, *, units: Any = None, **_: Any
    ) -> tuple[optax.Updates, CompressedMeanState]:
        structure = jax.tree.structure(updates)
        gradients, errors = jax.tree.leaves(updates), structure.flatten_up_to(state.errors)
        scales = [jnp.ones(())] * len(gradients) if units is None else jax.tree.leaves(units)
        few: list[bool] = jax.tree.leaves(chosen(updates))
        parts = {
            i: Part(gradients[i], errors[i] if error_feedback else none_yet(gradients[i], True), scales[i])
            for i, yes in enumerate(few)
            if yes
        }
        means, left = means_of_codes(list(parts.values()), codec, axis)
        out = [g if yes else lax.pmean(g.astype(jnp.float32), axis) for g, yes in zip(gradients, few, strict=True)]
        for i, mean, owed in zip(parts, means, left, strict=True):
            out[i] = mean
            errors[i] = owed if error_feedback else errors[i]
        out = [mean.astype(g.dtype) for mean, g in zip(out, gradients, strict=True)]
        return structure.unflatten(out), CompressedMeanState(structure.unflatten(errors))

    return optax.GradientTransformationExtraArgs(init, update)
