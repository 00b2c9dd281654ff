"""How gradients cross `data`: summed as they are, or in few bits, what rounding costs being owed to the next step.

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

from dsv3_jax.exchange.compress import Codec, Errors, Part, has_shares, means_of_codes, second_moment_units, split_axis
from dsv3_jax.model.layout import Layout, is_float32
from dsv3_jax.model.names import variables_by_name
from dsv3_jax.parallel.rules import is_variable, mesh_axes
from dsv3_jax.precision.platforms import platform_of


@dataclass(frozen=True)
class _Leaf:
    """A parameter whose gradients are sent in few bits, and where it is stored."""

    shape: tuple[int, ...]
    spec: P
    cut: int | None  # the axis of which each replica sums up a share; None where that is a share of its numbers in a row

    def errors(self, replicas: int) -> Errors[jax.Array]:
        return Errors(jnp.zeros((replicas, *self.shape)), None if self.cut is None else jnp.zeros(self.shape))

    @property
    def specs(self) -> Errors[P]:
        if self.cut is None:
            return Errors(P("data", *self.spec), None)
        entries = [*self.spec, *[None] * (len(self.shape) - len(self.spec))]
        entries[self.cut] = (*mesh_axes(entries[self.cut]), "data")
        return Errors(P("data", *self.spec), P(*entries))


def in_few_bits(variable: nnx.Variable) -> bool:
    """Whether a parameter's gradients may be: matrices, but not the router's, nor the embedding's.

    Of the embedding most rows are zero, and 2 bits have no zero: what they make of such rows, Adam takes for a direction.
    """
    return not is_float32(variable) and "embed_in" not in variable.get_metadata("logical_axes")


def _values(tree: nnx.State, names: Iterable[str]) -> dict[str, jax.Array]:
    named = variables_by_name(tree)
    return {name: named[name].get_value() for name in names}


def _buckets(names: Iterable[str]) -> list[list[str]]:
    """What is sent together: the head, a stack of layers. The backward pass is done with one after the other, so that a
    compiler can send the codes of the first while it goes on; one message of all would wait for its end."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.split("/")[0], []).append(name)
    return list(found.values())


def _leaves(params: nnx.State, layout: Layout) -> dict[str, _Leaf]:
    """By name, those whose gradients are sent in few bits."""
    found = {}
    for name, variable in variables_by_name(params).items():
        if not in_few_bits(variable):
            continue
        spec, shape = layout.stored_spec(variable), variable.get_value().shape
        shard = layout.sharding(spec).shard_shape(shape)
        if has_shares(shard, layout.replicas):
            found[name] = _Leaf(shape, spec, split_axis(shard, layout.replicas))
    return found


def share_in_few_bits(params: nnx.State, layout: Layout) -> float:
    """Of a device's numbers, those whose gradients can cross `data` in few bits; `params` may be abstract."""
    leaves, of_device = _leaves(params, layout), {}
    for name, variable in variables_by_name(params).items():
        sharding = layout.sharding(layout.stored_spec(variable))
        of_device[name] = math.prod(sharding.shard_shape(variable.get_value().shape))
    return sum(of_device[name] for name in leaves) / sum(of_device.values())


@dataclass(frozen=True)
class Exchange:
    """Of gradients of parameters over the replicas of a layout, in `bits`; 0 bits, or one replica, leave them as they are."""

    layout: Layout
    bits: Literal[0, 1, 2, 4, 8, "auto"]

    @property
    def replicas(self) -> int:
        return self.layout.replicas if self.bits else 1

    def _leaves(self, params: nnx.State) -> dict[str, _Leaf]:
        return _leaves(params, self.layout) if self.replicas > 1 else {}

    def init(self, params: nnx.State) -> dict[str, Errors[jax.Array]]:
        """Nothing is owed: by parameter, float32 [R, ...] of the replicas' gradients, and [...] of their mean if it is cut."""
        return {name: leaf.errors(self.replicas) for name, leaf in self._leaves(params).items()}

    def shardings(self, params: nnx.State) -> dict[str, Errors[Sharding]]:
        specs = {name: leaf.specs for name, leaf in self._leaves(params).items()}
        return jax.tree.map(self.layout.sharding, specs)

    def sum(self, parts: nnx.State, errors: dict[str, Errors], second_moment: nnx.State) -> tuple[nnx.State, dict[str, Errors]]:
        """(the sum over the replicas of [R, ...] gradients, what is owed then), rounded in units of Adam's second moment."""
        whole = jax.tree.map(lambda a: a.sum(0), parts)
        leaves = self._leaves(whole)
        if not leaves:
            return whole, errors
        assert self.bits not in (0, "auto"), "`auto` is resolved before anything is made (cost/compression.py)"
        codec, replicas = Codec(self.bits), self.replicas
        # no plug-in has kernels for codes
        implementation = "auto" if platform_of(self.layout.device).implementation == "auto" else "reference"

        def on_each(parts: dict, errors: dict[str, Errors[jax.Array]], moments: dict) -> tuple[dict, dict]:
            kept = {name: Errors(e.worker[0], e.server) for name, e in errors.items()}
            sums, left = {}, {}
            for names in _buckets(leaves):
                found = [Part(parts[n][0], kept[n], second_moment_units(moments[n])) for n in names]
                means, owed = means_of_codes(found, codec, "data", implementation)
                sums |= {name: mean * replicas for name, mean in zip(names, means, strict=True)}
                left |= {name: Errors(e.worker[None], e.server) for name, e in zip(names, owed, strict=True)}
            return sums, left

        specs = {name: leaf.specs for name, leaf in leaves.items()}
        of_replicas, stored = {name: e.worker for name, e in specs.items()}, {name: leaf.spec for name, leaf in leaves.items()}
        exchanged = self.layout.on_each_device(on_each, (of_replicas, specs, stored), (stored, specs))
        sums, errors = exchanged(_values(parts, leaves), errors, _values(second_moment, leaves))

        summed = [
            variable.replace(sums[name]) if name in sums else variable for name, variable in variables_by_name(whole).items()
        ]
        return jax.tree.unflatten(jax.tree.structure(whole, is_leaf=is_variable), summed), errors
