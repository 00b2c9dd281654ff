"""Weights that a checkpoint holds in few bits (see `pallas_kernels.integer_weight`), as `dsv3 compress` writes them.

In the place of such an array X, the set of weights has X/codes, X/scale and, if groups have zero points, X/zero. The
checkpoint's metadata list them under `integers`, by the names of the model's arrays.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.errors import UserError
from dsv3_jax.model.names import variables_by_name
from pallas_kernels.integer_weight import BITS, IntegerFormat, IntegerWeight

INTEGERS = "integers"  # the key of the metadata


@dataclass(frozen=True)
class IntegerArray:
    """An array's format, and how many of its axes are inputs and, after them, outputs; those before are layers and experts."""

    format: IntegerFormat
    inputs: int
    outputs: int

    def weight(self, shape: tuple[int, ...], make: Any = jax.ShapeDtypeStruct) -> IntegerWeight:
        """The integer weight that stands for an array of this shape; `make(shape, dtype)` makes its arrays."""
        lead = len(shape) - self.inputs - self.outputs
        inputs, outputs = shape[lead : lead + self.inputs], shape[lead + self.inputs :]
        K = math.prod(inputs)

        def part(size: int, dtype: Any) -> Any:
            return make((*shape[:lead], size, *outputs), jnp.dtype(dtype))

        groups = K // self.format.group
        zero = None if self.format.symmetric else part(groups, np.uint8)
        codes = part(K // self.format.codes_per_byte, np.uint8)
        return IntegerWeight(codes, part(groups, np.float16), zero, self.format, inputs, len(outputs))

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self.format), "inputs": self.inputs, "outputs": self.outputs}


def integer_arrays(metadata: Mapping[str, Any], where: str) -> dict[str, IntegerArray]:
    """The integer arrays that a checkpoint's metadata list, by the names of the model's arrays.

    Raises `UserError` for a list that this version cannot read.
    """
    found = {}
    for name, entry in (metadata.get(INTEGERS) or {}).items():
        try:
            bits, group, symmetric = entry["bits"], entry["group"], entry["symmetric"]
            found[name] = IntegerArray(IntegerFormat(bits, group, symmetric), entry["inputs"], entry["outputs"])
            valid = bits in BITS and type(group) is int and group > 0 and type(symmetric) is bool
        except (KeyError, TypeError):
            valid = False
        if not valid:
            raise UserError(f"{where}: integers.{name} is no format that this version reads; was it written by a newer one?")
    return found


def integer_templates(params: nnx.State, arrays: Mapping[str, IntegerArray]) -> nnx.State:
    """Templates of a model's parameters with integer weights where the checkpoint has them, sharded as the dense ones."""
    copied = jax.tree.map(lambda a: a, params)
    for name, variable in variables_by_name(copied).items():
        if name in arrays:
            dense = variable.get_value()
            lead = len(dense.shape) - arrays[name].inputs - arrays[name].outputs
            variable.set_value(arrays[name].weight(dense.shape, _like(dense.sharding, lead, arrays[name].inputs)))
    return copied


def _like(sharding: Any, lead: int, inputs: int) -> Any:
    """Makes templates that are sharded as a dense array is, along every axis that divides."""
    if not isinstance(sharding, NamedSharding):
        return lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def make(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        axes = [*sharding.spec] + [None] * (len(shape) + inputs - 1 - len(sharding.spec))
        merged = [*axes[:lead], axes[lead], *axes[lead + inputs :]]  # inputs that are one axis here are split as their first
        sizes = [
            math.prod(sharding.mesh.shape[a] for a in ((axis,) if isinstance(axis, str) else axis or ())) for axis in merged
        ]
        spec = [axis if size % parts == 0 else None for axis, size, parts in zip(merged, shape, sizes, strict=True)]
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(sharding.mesh, PartitionSpec(*spec)))

    return make


def dequantized(params: nnx.State, templates: nnx.State) -> nnx.State:
    """Parameters without integer weights: dense ones, in the dtypes and shardings of the templates."""
    dense = variables_by_name(templates)
    for name, variable in variables_by_name(params).items():
        value, template = variable.get_value(), dense[name].get_value()
        if isinstance(value, IntegerWeight):
            to_dense = jax.jit(lambda w, dtype=template.dtype: w.astype(dtype), out_shardings=template.sharding)
            variable.set_value(to_dense(value))
    return params
