"""How gradients cross `data`: summed as they are, or in few bits with error feedback.

Shards of `fsdp`, `expert`, `tensor` and `pipe` stay where they are: each device exchanges the gradients of its own shard with
those that hold the same shard for other replicas, after everything inside a replica has been summed.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.sharding import Sharding

from dsv3_jax.exchange.codec import Codec
from dsv3_jax.exchange.mean import Part, means_of_codes, second_moment_units
from dsv3_jax.exchange.residual import Residual
from dsv3_jax.exchange.wire import has_shares, split_axis
from dsv3_jax.model.layout import Layout
from dsv3_jax.model.names import variables_by_name
from dsv3_jax.model.parameters import kind_of
from dsv3_jax.parallel.rules import is_variable, mesh_axes
from dsv3_jax.precision.platforms import platform_of


@dataclass(frozen=True)
class _Leaf:
    """A parameter whose gradients are compressed, and where it is stored."""

    shape: tuple[int, ...]
    spec: P
    cut: int | None  # the axis of which each replica sums up a share; None where that is a share of its numbers in a row

    def zero_residual(self, replicas: int) -> Residual[jax.Array]:
        worker = jnp.zeros((replicas, *self.shape), jnp.float32)
        return Residual(worker, None if self.cut is None else jnp.zeros(self.shape, jnp.float32))

    @property
    def specs(self) -> Residual[P]:
        """Where the residual is stored."""
        if self.cut is None:
            return Residual(P("data", *self.spec), None)
        entries = [*self.spec, *[None] * (len(self.shape) - len(self.spec))]
        entries[self.cut] = (*mesh_axes(entries[self.cut]), "data")
        return Residual(P("data", *self.spec), P(*entries))


def _values(tree: nnx.State, names: Iterable[str]) -> dict[str, jax.Array]:
    named = variables_by_name(tree)
    return {name: named[name].get_value() for name in names}


def _buckets(names: Iterable[str]) -> list[list[str]]:
    """The parameters whose codes are sent together: the head, a stack of layers.

    The backward pass is done with one after the other, so that a compiler can send the codes of the first while it goes on;
    one message of all would wait for its end.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.split("/")[0], []).append(name)
    return list(found.values())


def _leaves(params: nnx.State, layout: Layout) -> dict[str, _Leaf]:
    """The parameters whose gradients are compressed, by name."""
    found = {}
    for name, variable in variables_by_name(params).items():
        if not kind_of(variable).compressible:
            continue
        spec, shape = layout.stored_spec(variable), variable.get_value().shape
        shard = layout.sharding(spec).shard_shape(shape)
        if has_shares(shard, layout.replicas):
            found[name] = _Leaf(shape, spec, split_axis(shard, layout.replicas))
    return found


def compressible_share(params: nnx.State, layout: Layout) -> float:
    """The share of a device's parameters, which may be abstract, whose gradients can cross `data` in few bits."""
    leaves, of_device = _leaves(params, layout), {}
    for name, variable in variables_by_name(params).items():
        sharding = layout.sharding(layout.stored_spec(variable))
        of_device[name] = math.prod(sharding.shard_shape(variable.get_value().shape))
    return sum(of_device[name] for name in leaves) / sum(of_device.values())


@dataclass(frozen=True)
class Exchange:
    """How the replicas of a layout add up their gradients: in `bits`, or as they are for 0 bits."""

    layout: Layout
    bits: Literal[0, 1, 2, 4, 8, "auto"]

    @property
    def compresses(self) -> bool:
        """Whether any gradients cross `data` in few bits."""
        return self.bits != 0 and self.layout.replicas > 1

    def _leaves(self, params: nnx.State) -> dict[str, _Leaf]:
        return _leaves(params, self.layout) if self.compresses else {}

    def init(self, params: nnx.State) -> dict[str, Residual[jax.Array]]:
        """Residuals before the first step, all zero, by the names of compressed parameters.

        Of R replicas `worker` is f32[R, ...] and `server`, which all share, f32[...] if an axis can be cut.
        """
        leaves = self._leaves(params)
        return {name: leaf.zero_residual(self.layout.replicas) for name, leaf in leaves.items()}

    def residual_bytes(self, params: nnx.State) -> int:
        """Bytes on a device of the residuals of these parameters, which may be abstract."""
        total = 0
        for leaf in self._leaves(params).values():
            own = 4 * math.prod(self.layout.sharding(leaf.spec).shard_shape(leaf.shape))
            total += own + (0 if leaf.cut is None else own // self.layout.replicas)
        return total

    def shardings(self, params: nnx.State) -> dict[str, Residual[Sharding]]:
        """Shardings of the residuals."""
        specs = {name: leaf.specs for name, leaf in self._leaves(params).items()}
        return jax.tree.map(self.layout.sharding, specs)

    def reduce(
        self, parts: nnx.State, residuals: dict[str, Residual], second_moment: nnx.State | None
    ) -> tuple[nnx.State, dict[str, Residual]]:
        """The sum of gradients over replicas, and the residuals that are left.

        Args:
            parts: [R, ...] gradients of each replica.
            second_moment: in whose units gradients are rounded, in the tree of the parameters; None: in units of 1.
        """
        uncompressed = jax.tree.map(lambda a: a.sum(0), parts)
        leaves = self._leaves(uncompressed)
        if not leaves:
            return uncompressed, residuals
        assert self.bits not in (0, "auto"), "`auto` is resolved before anything is made (cost/compression.py)"
        codec, replicas = Codec(self.bits), self.layout.replicas
        # no plug-in has kernels for codes
        implementation = "auto" if platform_of(self.layout.device).implementation == "auto" else "reference"

        def on_each(parts: dict, residuals: dict[str, Residual[jax.Array]], moments: dict) -> tuple[dict, dict]:
            own = {name: Residual(e.worker[0], e.server) for name, e in residuals.items()}
            sums, left = {}, {}
            for names in _buckets(leaves):
                units = [second_moment_units(moments[n]) if moments else jnp.float32(1) for n in names]
                bucket = [Part(parts[n][0], own[n], unit) for n, unit in zip(names, units, strict=True)]
                means, new = means_of_codes(bucket, codec, "data", implementation)
                sums |= {name: mean * replicas for name, mean in zip(names, means, strict=True)}
                left |= {name: Residual(e.worker[None], e.server) for name, e in zip(names, new, strict=True)}
            return sums, left

        specs = {name: leaf.specs for name, leaf in leaves.items()}
        by_replica, stored = {name: e.worker for name, e in specs.items()}, {name: leaf.spec for name, leaf in leaves.items()}
        moments = {} if second_moment is None else _values(second_moment, leaves)
        in_specs = by_replica, specs, stored if moments else {}
        exchanged = self.layout.on_each_device(on_each, in_specs, (stored, specs))
        sums, residuals = exchanged(_values(parts, leaves), residuals, moments)

        named = variables_by_name(uncompressed)
        summed = [variable.replace(sums[name]) if name in sums else variable for name, variable in named.items()]
        return jax.tree.unflatten(jax.tree.structure(uncompressed, is_leaf=is_variable), summed), residuals
