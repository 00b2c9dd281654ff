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

    def encode(self, x: Float[Array, "*rows n"]) -> UInt8[Array, "*rows blocks bytes"]:
        """Of float32 numbers, n a multiple of `block`. A number that is not finite makes its block so."""
        x = x.reshape(*x.shape[:-1], -1, self.block)
        largest = jnp.abs(x).max(-1, keepdims=True)
        scale = largest
        if self._gaussian:
            # squares of numbers up to 1, whatever the numbers are
            scale = largest * jnp.sqrt(jnp.mean(jnp.square(_ratio(x, jnp.maximum(largest, _TINY))), -1, keepdims=True))
        scale = jnp.where(scale < _TINY, 0, scale)
        unit = _ratio(x, jnp.where(scale == 0, 1, scale))
        if self._gaussian:
            edges = (self._table[1:] + self._table[:-1]) / 2
            code = sum((unit > edge).astype(jnp.int32) for edge in edges)
        else:
            code = jnp.clip(jnp.round((unit + 1) / 2 * (2**self.bits - 1)), 0, 2**self.bits - 1)
        scale_bytes = lax.bitcast_convert_type(scale, jnp.uint8).reshape(*scale.shape[:-1], _SCALE_BYTES)
        return jnp.concatenate([self._pack(jnp.asarray(code).astype(jnp.uint8)), scale_bytes], -1)

    def decode(self, sent: UInt8[Array, "*rows blocks bytes"]) -> Float[Array, "*rows n"]:
        """float32."""
        codes, scale_bytes = sent[..., :-_SCALE_BYTES], sent[..., -_SCALE_BYTES:]
        scale = lax.bitcast_convert_type(scale_bytes, jnp.float32)[..., None]
        x = jnp.asarray(self._table)[self._unpack(codes)] * scale
        return x.reshape(*sent.shape[:-2], -1)

    def _shifts(self) -> np.ndarray:
        return np.arange(0, 8, self.bits, dtype=np.uint8)

    def _pack(self, code: UInt8[Array, "*rows n"]) -> UInt8[Array, "*rows bytes"]:
        parts = code.reshape(*code.shape[:-1], -1, 8 // self.bits) << self._shifts()
        return parts.sum(-1, dtype=jnp.uint8)

    def _unpack(self, packed: UInt8[Array, "*rows bytes"]) -> UInt8[Array, "*rows n"]:
        parts = (packed[..., None] >> self._shifts()) & jnp.uint8(2**self.bits - 1)
        return parts.reshape(*packed.shape[:-1], -1)


class Errors(NamedTuple):
    """What rounding has cost an array and was not yet sent; each in the array's axes, so that any mesh can hold it."""

    worker: Float[Array, "..."]  # of this replica's gradients, in their shape
    server: Float[Array, "..."]  # of the mean of its share: the array cut along `split_axis`


def split_axis(shape: tuple[int, ...], replicas: int) -> int | None:
    """The first axis that can be cut into a share for each replica; None if there is none."""
    return next((axis for axis, size in enumerate(shape) if size % replicas == 0 and size), None)


def no_errors(shape: tuple[int, ...], axis: int, replicas: int, dtype: jnp.dtype) -> Errors:
    share = tuple(size // replicas if i == axis else size for i, size in enumerate(shape))
    return Errors(jnp.zeros(shape, dtype), jnp.zeros(share, dtype))


def mean_of_codes(
    x: Float[Array, "..."], errors: Errors, codec: Codec, mesh_axis: str, cut: int
) -> tuple[Float[Array, "..."], Errors]:
    """(the mean over `mesh_axis` as rounded, the same bits on every replica; the errors that are left). Where axes are manual.

    Shares are cut along axis `cut` of x. Summed over steps, the means given are those of x less the mean of `worker` and less
    `server`, to float rounding.
    """
    replicas, dtype = lax.axis_size(mesh_axis), errors.worker.dtype
    moved = jnp.moveaxis(x, cut, 0).shape
    codec = codec.fitted(x.size // replicas)

    def rows_of(a: Array, count: int) -> Array:
        """A row for each share, of `count`, filled up to whole blocks."""
        rows = jnp.moveaxis(a.astype(jnp.float32), cut, 0).reshape(count, -1)
        return jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % codec.block)))

    def array_of(rows: Array) -> Array:
        """The reverse."""
        shape = (moved[0] // replicas * rows.shape[0], *moved[1:])
        return jnp.moveaxis(rows[:, : math.prod(shape) // rows.shape[0]].reshape(shape), 0, cut)

    wanted = x.astype(jnp.float32) + errors.worker.astype(jnp.float32)
    sent = codec.encode(rows_of(wanted, replicas))
    worker = wanted - array_of(codec.decode(sent))
    received = lax.all_to_all(sent, mesh_axis, 0, 0)
    mean = array_of(codec.decode(received).mean(0, keepdims=True)) + errors.server.astype(jnp.float32)
    code = codec.encode(rows_of(mean, 1))
    server = mean - array_of(codec.decode(code))
    means = codec.decode(lax.all_gather(code, mesh_axis, tiled=True))
    return array_of(means), Errors(worker.astype(dtype), server.astype(dtype))


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
) -> optax.GradientTransformation:
    """Replaces each replica's gradients by their mean over `axis`, sent in `bits`; first in an `optax.chain`.

    For code in which `axis` is manual (`shard_map`): `init` and `update` see one device's shards, and the state is that
    device's. `mask`, a tree of booleans or a function of the parameters, says what is compressed (all if None); the rest, and
    what has no axis that the replicas divide, is averaged in float32. `dtype` is what errors are kept in; in bfloat16 their own
    rounding is lost. Without `error_feedback` there are none. Gradients that are not finite come back as such.
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
        return CompressedMeanState(_map(none_yet, params, chosen(params)))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, CompressedMeanState]:
        def of(gradient: Array, cut: int | None, errors: Any) -> tuple[Array, Any]:
            if cut is None:
                return lax.pmean(gradient.astype(jnp.float32), axis).astype(gradient.dtype), errors
            before = errors if error_feedback else none_yet(gradient, cut)
            mean, left = mean_of_codes(gradient, before, codec, axis, cut)
            return mean.astype(gradient.dtype), left if error_feedback else errors

        found = _map(of, updates, chosen(updates), state.errors)
        means, errors = (jax.tree.map(lambda _, pair, i=i: pair[i], updates, found) for i in (0, 1))
        return means, CompressedMeanState(errors)

    return optax.GradientTransformation(init, update)


def _map(f: Callable, tree: Any, *others: Any) -> Any:
    """f of each leaf of `tree` and what stands in its place in the others, whatever that is."""
    structure = jax.tree.structure(tree)
    return structure.unflatten(map(f, jax.tree.leaves(tree), *(structure.flatten_up_to(other) for other in others)))
