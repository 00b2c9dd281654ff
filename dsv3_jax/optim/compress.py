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
from jaxtyping import Array, Float, UInt8

_SCALE_BYTES = 4
_TINY = 1e-30  # a block of smaller numbers is sent as zeros, whose error is kept: dividing by its scale would overflow
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


def _ratio(x: Array, scale: Array) -> Array:
    """x / scale. XLA may multiply by 1 / scale instead, which of the largest numbers is taken for zero."""
    return (x * 2.0**-10) / (scale * 2.0**-10)


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
        if self.block < 8 or self.block % 8:
            raise ValueError(f"block={self.block}: use a multiple of 8")
        if self.levels not in ("gaussian", "uniform"):
            raise ValueError(f"levels={self.levels!r}: use gaussian or uniform")

    @property
    def block_bytes(self) -> int:
        return self.block * self.bits // 8 + _SCALE_BYTES

    @property
    def _gaussian(self) -> bool:
        return self.levels == "gaussian" and self.bits < 8

    @property
    def _table(self) -> np.ndarray:
        """Levels in units of the scale, ascending, none of them zero."""
        if self._gaussian:
            return _gaussian_levels(self.bits)
        return np.linspace(-1, 1, 2**self.bits, dtype=np.float32)

    def fitted(self, n: int) -> "Codec":
        """With blocks a little smaller, of which a whole number holds n numbers: filling up would make scales too small."""
        blocks = -(-n // self.block)
        return replace(self, block=-(-n // (8 * blocks)) * 8)

    def _scaled(self, x: Float[Array, "*rows n"]) -> tuple[Float[Array, "*rows blocks block"], Float[Array, "*rows blocks 1"]]:
        """(numbers in units of their block's scale, the scales)."""
        x = x.reshape(*x.shape[:-1], -1, self.block)
        largest = jnp.abs(x).max(-1, keepdims=True)
        scale = largest
        if self._gaussian:
            # squares of numbers up to 1, whatever the numbers are
            scale = largest * jnp.sqrt(jnp.mean(jnp.square(_ratio(x, jnp.maximum(largest, _TINY))), -1, keepdims=True))
        scale = jnp.where(scale < _TINY, 0, scale)
        return _ratio(x, jnp.where(scale == 0, 1, scale)), scale

    def _code(self, unit: Array) -> UInt8[Array, "..."]:
        if self._gaussian:
            edges = (self._table[1:] + self._table[:-1]) / 2
            return jnp.asarray(sum((unit > edge).astype(jnp.uint8) for edge in edges))
        return jnp.clip(jnp.round((unit + 1) / 2 * (2**self.bits - 1)), 0, 2**self.bits - 1).astype(jnp.uint8)

    def _level(self, code: UInt8[Array, "..."]) -> Float[Array, "..."]:
        """By comparisons, which vectorise, unless there are many levels; a table look-up is ten times slower on CPUs."""
        if self.bits == 8:
            return jnp.asarray(self._table)[code]
        level = jnp.full(code.shape, self._table[0])
        for i, value in enumerate(self._table[1:], 1):
            level = jnp.where(code >= i, value, level)
        return level

    def encode(self, x: Float[Array, "*rows n"]) -> UInt8[Array, "*rows blocks bytes"]:
        """Of float32 numbers, n a multiple of `block`. A number that is not finite makes its block so."""
        unit, scale = self._scaled(x)
        scale_bytes = lax.bitcast_convert_type(scale, jnp.uint8).reshape(*scale.shape[:-1], _SCALE_BYTES)
        return jnp.concatenate([self._pack(self._code(unit)), scale_bytes], -1)

    def decode(self, sent: UInt8[Array, "*rows blocks bytes"]) -> Float[Array, "*rows n"]:
        """float32."""
        codes, scale_bytes = sent[..., :-_SCALE_BYTES], sent[..., -_SCALE_BYTES:]
        scale = lax.bitcast_convert_type(scale_bytes, jnp.float32)[..., None]
        return (self._level(self._unpack(codes)) * scale).reshape(*sent.shape[:-2], -1)

    def rounded(self, x: Float[Array, "*rows n"]) -> Float[Array, "*rows n"]:
        """`decode` of `encode`, without the bytes between."""
        unit, scale = self._scaled(x)
        return (self._level(self._code(unit)) * scale).reshape(x.shape)

    def _shifts(self) -> np.ndarray:
        return np.arange(0, 8, self.bits, dtype=np.uint8)

    def _pack(self, code: UInt8[Array, "*rows n"]) -> UInt8[Array, "*rows bytes"]:
        """Byte i has numbers i, i + bytes, i + 2 bytes and so on: neighbours stay neighbours, which suits vector units."""
        parts = code.reshape(*code.shape[:-1], 8 // self.bits, -1) << self._shifts()[:, None]
        return parts.sum(-2, dtype=jnp.uint8)

    def _unpack(self, packed: UInt8[Array, "*rows bytes"]) -> UInt8[Array, "*rows n"]:
        parts = (packed[..., None, :] >> self._shifts()[:, None]) & jnp.uint8(2**self.bits - 1)
        return parts.reshape(*packed.shape[:-1], -1)


class Errors[T](NamedTuple):
    """What rounding has cost an array and was not yet sent; each in the array's axes, so that any mesh can hold it.

    T is Array, or what says something of one: its sharding.
    """

    worker: T  # of this replica's gradients, in their shape
    server: T  # of the mean of its share: the array cut along `split_axis`


def split_axis(shape: tuple[int, ...], replicas: int) -> int | None:
    """The first axis that can be cut into a share for each replica; None if there is none."""
    return next((axis for axis, size in enumerate(shape) if size % replicas == 0 and size), None)


def no_errors(shape: tuple[int, ...], axis: int, replicas: int, dtype: jnp.dtype) -> Errors[Array]:
    share = tuple(size // replicas if i == axis else size for i, size in enumerate(shape))
    return Errors(jnp.zeros(shape, dtype), jnp.zeros(share, dtype))


@dataclass(frozen=True)
class _Wire:
    """How an array of `shape` travels: in a share for each replica, cut along axis `cut`, of whole blocks of `codec`."""

    shape: tuple[int, ...]
    cut: int
    replicas: int
    codec: Codec

    @classmethod
    def of(cls, shape: tuple[int, ...], cut: int, replicas: int, codec: Codec) -> "_Wire":
        return cls(shape, cut, replicas, codec.fitted(math.prod(shape) // replicas))

    @property
    def share_size(self) -> int:
        return math.prod(self.shape) // self.replicas

    @property
    def share_bytes(self) -> int:
        return -(-self.share_size // self.codec.block) * self.codec.block_bytes

    def encode(self, a: Float[Array, "..."]) -> UInt8[Array, "shares bytes"]:
        """Of the array, or of one share of it."""
        rows = jnp.moveaxis(a, self.cut, 0).reshape(-1, self.share_size)
        rows = jnp.pad(rows, ((0, 0), (0, -self.share_size % self.codec.block)))
        return self.codec.encode(rows).reshape(-1, self.share_bytes)

    def decode_rows(self, sent: UInt8[Array, "shares bytes"]) -> Float[Array, "shares n"]:
        sent = sent.reshape(sent.shape[0], -1, self.codec.block_bytes)
        return self.codec.decode(sent)[:, : self.share_size]

    def array_of(self, rows: Float[Array, "shares n"]) -> Float[Array, "..."]:
        """The array, or one share of it."""
        first = self.shape[self.cut] // self.replicas * rows.shape[0]
        rest = self.shape[: self.cut] + self.shape[self.cut + 1 :]
        return jnp.moveaxis(rows.reshape(first, *rest), 0, self.cut)

    def own_share(self, a: Float[Array, "..."], mesh_axis: str) -> Float[Array, "..."]:
        """This replica's share of an array of the shape, or of a number."""
        if not a.ndim:
            return a
        size = self.shape[self.cut] // self.replicas
        return lax.dynamic_slice_in_dim(a, lax.axis_index(mesh_axis) * size, size, self.cut)

    def decode(self, sent: UInt8[Array, "shares bytes"]) -> Float[Array, "..."]:
        return self.array_of(self.decode_rows(sent))


def _joined(parts: list[UInt8[Array, "shares _"]]) -> UInt8[Array, "shares bytes"]:
    return jnp.concatenate(parts, 1)


def _parted(joined: UInt8[Array, "shares bytes"], wires: list[_Wire]) -> list[UInt8[Array, "shares _"]]:
    ends = np.cumsum([wire.share_bytes for wire in wires])[:-1].tolist()
    return jnp.split(joined, ends, 1)


class Part(NamedTuple):
    """A replica's array, of which the mean is wanted."""

    x: Float[Array, "..."]
    errors: Errors[Array]
    unit: Float[Array, "..."]  # positive, the same on all replicas, of the shape of x or a number: what x is rounded in
    cut: int  # the axis of x along which shares are cut


def means_of_codes(parts: list[Part], codec: Codec, mesh_axis: str) -> tuple[list[Float[Array, "..."]], list[Errors[Array]]]:
    """(the means over `mesh_axis` as rounded, the same bits on every replica; the errors that are left). Where axes are manual.

    All travel in one message of each phase. Summed over steps, the means given are those of x less the mean of `worker` and
    less `server`, to float rounding.
    """
    if not parts:
        return [], []
    replicas = lax.axis_size(mesh_axis)
    wires = [_Wire.of(p.x.shape, p.cut, replicas, codec) for p in parts]
    wanted = [p.x.astype(jnp.float32) + p.errors.worker.astype(jnp.float32) for p in parts]
    sent = [wire.encode(w / p.unit) for wire, w, p in zip(wires, wanted, parts, strict=True)]
    worker = [w - wire.decode(s) * p.unit for wire, w, s, p in zip(wires, wanted, sent, parts, strict=True)]

    received = _parted(lax.all_to_all(_joined(sent), mesh_axis, 0, 0), wires)
    units = [wire.own_share(p.unit, mesh_axis) for wire, p in zip(wires, parts, strict=True)]
    shares = [
        wire.array_of(wire.decode_rows(r).mean(0, keepdims=True)) * unit + p.errors.server.astype(jnp.float32)
        for wire, r, unit, p in zip(wires, received, units, parts, strict=True)
    ]
    codes = [wire.encode(share / unit) for wire, share, unit in zip(wires, shares, units, strict=True)]
    server = [s - wire.decode(code) * unit for wire, s, code, unit in zip(wires, shares, codes, units, strict=True)]

    gathered = _parted(lax.all_gather(_joined(codes), mesh_axis, tiled=True), wires)
    means = [wire.decode(g) * p.unit for wire, g, p in zip(wires, gathered, parts, strict=True)]
    left = [
        Errors(w.astype(p.errors.worker.dtype), s.astype(p.errors.server.dtype))
        for w, s, p in zip(worker, server, parts, strict=True)
    ]
    return means, left


def second_moment_units(v: Float[Array, "..."]) -> Float[Array, "..."]:
    """What Adam divides by, as units of what is rounded: else the noise of large numbers is all that small ones become.

    A part of the array's own mean keeps numbers whose v is zero yet from drowning the others of their block.
    """
    v = v.astype(jnp.float32)
    return jnp.sqrt(v) + _UNIT_FLOOR * jnp.sqrt(v.mean()) + _TINY


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
    what has no axis that the replicas divide, is averaged in float32. `dtype` is what errors are kept in; in bfloat16 their own
    rounding is lost. Without `error_feedback` there are none. Gradients that are not finite come back as such.

    `update` takes `units`, a tree of positive arrays, the same on all replicas: what small gradients are small by, such as
    `second_moment_units` of Adam's second moment. Gradients are rounded in them; in units of 1 if there are none.
    """
    codec = Codec(bits, block, levels)

    def chosen(tree: Any) -> Any:
        """Where each leaf is cut into shares; None for what is averaged in float32."""
        found = mask(tree) if callable(mask) else mask
        found = jax.tree.map(lambda _: True, tree) if found is None else found
        return jax.tree.map(lambda leaf, yes: split_axis(leaf.shape, lax.axis_size(axis)) if yes else None, tree, found)

    def none_yet(leaf: Array, cut: int | None) -> Any:
        return optax.MaskedNode() if cut is None else no_errors(leaf.shape, cut, lax.axis_size(axis), dtype)

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
        cuts: list[int | None] = structure.flatten_up_to(chosen(updates))
        parts = {
            i: Part(gradients[i], errors[i] if error_feedback else none_yet(gradients[i], cut), scales[i], cut)
            for i, cut in enumerate(cuts)
            if cut is not None
        }
        means, left = means_of_codes(list(parts.values()), codec, axis)
        out = [lax.pmean(g.astype(jnp.float32), axis) if cut is None else g for g, cut in zip(gradients, cuts, strict=True)]
        for i, mean, owed in zip(parts, means, left, strict=True):
            out[i] = mean
            errors[i] = owed if error_feedback else errors[i]
        out = [mean.astype(g.dtype) for mean, g in zip(out, gradients, strict=True)]
        return structure.unflatten(out), CompressedMeanState(structure.unflatten(errors))

    return optax.GradientTransformationExtraArgs(init, update)
