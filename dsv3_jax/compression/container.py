"""A compressed checkpoint: an ordinary one whose linear layers are integers, written a layer at a time."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.checkpoint.direct import array_reader
from dsv3_jax.checkpoint.integers import IntegerArray
from dsv3_jax.checkpoint.names import weight_name
from dsv3_jax.checkpoint.piecewise import ChunkedArray, PiecewiseWriter, StoredArrays
from dsv3_jax.compression.profile import Profile
from dsv3_jax.config import ModelConfig
from dsv3_jax.interop.arrays import abstract_variables
from dsv3_jax.interop.hf_formats import usual_dtype
from dsv3_jax.interop.hf_tensors import Source, sources
from dsv3_jax.interop.safetensors_file import DTYPES
from pallas_kernels.integer_weight import IntegerWeight, dequantize

FIELDS = ("codes", "scale", "zero")


def integer_arrays_of(config: ModelConfig, profile: Profile) -> dict[str, IntegerArray]:
    """Which arrays of a model a profile makes integers of, and how."""
    found = {}
    variables = abstract_variables(config)
    for s in sources(config):
        format = profile.integer_format_of(s.array) if s.is_fp8 else None
        if format is not None:
            first = next(axis for axis, i in enumerate(s.full_index) if isinstance(i, slice))
            outputs = len(variables[s.array].get_value().shape) - first - s.inputs
            found[s.array] = IntegerArray(format.of(s.shape[1]), s.inputs, outputs)
    return found


def _merged(s: Source, per_axis: tuple[Any, ...], inputs: Any) -> tuple[Any, ...]:
    """Something for every axis of a source's array, with one entry, `inputs`, for all axes of inputs."""
    first = next(axis for axis, i in enumerate(s.full_index) if isinstance(i, slice))
    return (*per_axis[:first], inputs, *per_axis[first + s.inputs :])


class CompressedWriter:
    """Writes the container beside `target`, which exists once it is complete; goes on where one that was killed stopped."""

    def __init__(
        self, target: Any, identity: str, config: ModelConfig, integers: Mapping[str, IntegerArray], metadata: dict[str, Any]
    ):
        self._integers, self._variables = integers, abstract_variables(config)
        self._sources = list(sources(config))
        self._writer = PiecewiseWriter(target, identity, self._stored_arrays(), metadata)

    def _stored_arrays(self) -> dict[str, ChunkedArray]:
        found = {}
        for s in self._sources:
            name, shape = self._name(s.array), self._variables[s.array].get_value().shape
            if s.array not in self._integers:
                found[name] = _chunked(shape, DTYPES[usual_dtype(s, "hf-bf16")], s.chunk)
                continue
            weight = self._integers[s.array].weight(shape)
            for field in FIELDS:
                if (part := getattr(weight, field)) is not None:
                    stored = part.shape[len(part.shape) + weight.axis]
                    found[f"{name}/{field}"] = _chunked(part.shape, np.dtype(part.dtype), _merged(s, s.chunk, stored))
        return found

    def _name(self, array: str) -> str:
        return weight_name(array, self._variables[array])

    def _chunks(self, s: Source) -> list[str]:
        """The names of the stored arrays in which a source's tensor is."""
        if s.array not in self._integers:
            return [self._name(s.array)]
        fields = FIELDS[:2] if self._integers[s.array].format.symmetric else FIELDS
        return [f"{self._name(s.array)}/{field}" for field in fields]

    def _chunk_index(self, s: Source) -> tuple[int, ...]:
        index = s.full_index if s.array not in self._integers else s.integer_index
        return tuple(0 if isinstance(i, slice) else i for i in index)

    def done(self, prefix: str, lead: tuple[int, ...]) -> bool:
        """Whether all arrays that begin with a prefix are there, in their part that `lead` picks."""
        return all(self._writer.done(name, self._chunk_index(s)) for s in self._part(prefix, lead) for name in self._chunks(s))

    def _part(self, prefix: str, lead: tuple[int, ...]) -> list[Source]:
        return [s for s in self._sources if s.array.startswith(prefix) and s.full_index[: len(lead)] == lead]

    def write(self, prefix: str, lead: tuple[int, ...], values: Mapping[str, Any]) -> None:
        """Write arrays, dense or integer, by their names after a prefix; they are what `lead` picks of those in the model."""
        host: dict[str, Any] = {}
        for s in self._part(prefix, lead):
            name = s.array.removeprefix(prefix)
            if name not in host:
                value = values[name]
                host[name] = value if isinstance(value, IntegerWeight) else np.asarray(value)
            self._write(s, host[name], len(lead))

    def _write(self, s: Source, value: Any, lead: int) -> None:
        if not isinstance(value, IntegerWeight):
            dtype = DTYPES[usual_dtype(s, "hf-bf16")]
            region = value[s.full_index[lead:]].astype(dtype)
            self._writer.write(self._name(s.array), self._chunk_index(s), array_reader(region))
            return
        for stored in self._chunks(s):
            part = np.asarray(getattr(value, stored.rsplit("/", 1)[1]))
            self._writer.write(stored, self._chunk_index(s), array_reader(part[s.integer_index[lead:]]))

    def read(self, array: str, lead: tuple[int, ...]) -> np.ndarray:
        """f32 of an array, or of what `lead` picks of it, as an earlier writer left it; integers as what they stand for."""
        stored, name = StoredArrays(self._writer.path_of("")), self._name(array)

        def part(name: str) -> np.ndarray:
            return stored[name][lead].read().result()

        if array not in self._integers:
            return part(name).astype(np.float32)
        whole = self._integers[array].weight(self._variables[array].get_value().shape)
        fields = {field: part(f"{name}/{field}") for field in FIELDS if getattr(whole, field) is not None}
        return np.asarray(dequantize(replace(whole, **jax.tree.map(jnp.asarray, fields))))

    def path_of(self, name: str) -> Path:
        """Where a further file of the checkpoint is written."""
        return self._writer.path_of(name)

    def add_file(self, name: str, content: bytes) -> None:
        self._writer.add_file(name, content)

    def commit(self) -> None:
        self._writer.commit()


def _chunked(shape: tuple[int, ...], dtype: np.dtype, chunk: tuple[int, ...]) -> ChunkedArray:
    return ChunkedArray(tuple(shape), dtype, tuple(chunk), tuple(range(len(shape))))
