"""`load_hf`: a Hugging Face checkpoint as a model, on one device or on a mesh."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding

from dsv3_jax.cluster.processes import on_first
from dsv3_jax.config import ParallelConfig
from dsv3_jax.interop.hf_files import TensorFiles, open_hf, say
from dsv3_jax.interop.hf_tensors import Source
from dsv3_jax.interop.numbers import check_numbers
from dsv3_jax.model.layout import Layout
from dsv3_jax.model.names import variables_by_name
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.parallel.layout import make_layout
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.precision.recipes import Recipe

_BLOCK = 2**17  # numbers that are transposed at a time


def _part(files: TensorFiles, sources: Sequence[Source], shape: tuple[int, ...], index: Any) -> np.ndarray:
    """f32 array[index] of an array of this shape, from the tensors that fill it."""
    bounds = [i.indices(n) for i, n in zip(index, shape, strict=True)]
    out = np.empty([stop - start for start, stop, _ in bounds], np.float32)
    for s in sources:
        at, part = [], []
        for i, (start, stop, _), n in zip(s.full_index, bounds, shape, strict=True):
            at.append(i if isinstance(i, slice) else i - start)
            if isinstance(i, slice):
                part.append(slice(None) if (start, stop) == (0, n) else slice(start, stop))
            elif not start <= i < stop:
                break  # another device's
        else:
            region = s.to_region(files.read(s.tensor), tuple(part))
            _copy(
                region, out[tuple(at)], s.order.index(0), lambda rows, s=s: check_numbers(rows, str(files.directory), s.tensor)
            )
            files.release(s.tensor)
    return out


def _copy(region: np.ndarray, out: np.ndarray, axis: int, check: Callable[[np.ndarray], None]) -> None:
    """out[...] = region, as many of the tensor's rows (along `axis`) at a time as fit a core's cache while they are transposed.

    Seven times as fast as one assignment of a transposed bfloat16 matrix. `check` sees the rows before they are copied.
    """
    step = max(_BLOCK * region.shape[axis] // max(region.size, 1), 1)
    for i in range(0, region.shape[axis], step):
        rows = (*[slice(None)] * axis, slice(i, i + step))
        check(region[rows])
        out[rows] = region[rows].astype(out.dtype)


def _array(files: TensorFiles, sources: Sequence[Source], shape: tuple[int, ...], sharding: Sharding) -> jax.Array:
    """An array of which this process makes its devices' parts, with one part on the host at a time."""
    parts, before, part = [], None, None
    indices = sharding.addressable_devices_indices_map(shape)
    for device, index in sorted(indices.items(), key=lambda item: (str(item[1]), item[0].id)):
        if index != before:  # devices with the same part follow each other
            before, part = index, _part(files, sources, shape, index)
        parts.append(jax.device_put(part, device))
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def load_hf(directory: str | Path, dtype: Any = jnp.float32, parallel: ParallelConfig | None = None) -> Transformer:
    """Load the model of a Hugging Face checkpoint of DeepSeek-V3's architecture.

    Args:
        directory: Has config.json and safetensors in float32, bfloat16, float16 or DeepSeek's block-FP8.
        dtype: Of activations and products: jnp.float32 or jnp.bfloat16.
        parallel: The mesh over which parameters are sharded, as training stores them; every process reads only what its devices
            hold. None for one device.

    Returns:
        A flax.nnx module that maps tokens, i32[B, L], to logits, f32[B, L, V]. Parameters are float32 and hold exactly the
        checkpoint's numbers.

    Raises:
        UserError: config.json asks for what this architecture does not have, a tensor is missing, damaged or of another shape,
            or the mesh does not fit the devices.
    """
    found = open_hf(directory)
    on_first(found.check_copies)
    say(found)
    layout = Layout() if parallel is None else make_layout(parallel, make_mesh(parallel))
    recipe = Recipe(jnp.dtype(dtype).name)
    model = nnx.eval_shape(lambda: Transformer(found.config, recipe=recipe, layout=layout.serving, rngs=nnx.Rngs(0)))

    of_array: dict[str, list[Source]] = {}
    for s in found.sources:
        of_array.setdefault(s.array, []).append(s)

    graph, state = nnx.split(model)
    for name, variable in variables_by_name(state).items():
        shape = variable.get_value().shape
        sharding = layout.sharding(layout.stored_spec(variable))
        variable.set_value(_array(found.files, of_array[name], shape, sharding))
    return nnx.merge(graph, state)
