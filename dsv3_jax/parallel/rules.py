"""The one table from logical axis names to mesh axes, and everything that is read off it.

Parameters and optimiser state are stored sharded over `fsdp` and every axis that would otherwise hold copies (`expert`,
`pipe`), ZeRO-3; a layer gathers its own while it runs. `data` holds replicas. Mesh axes of an entry go from major to minor,
and `pipe` comes last, so that exchanging it for complete layers (see `pipeline.py`) moves contiguous pieces.
"""

import math
from collections.abc import Mapping
from typing import Any

from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from dsv3_jax.checks import choices
from dsv3_jax.config import Config
from dsv3_jax.errors import UserError

MeshAxes = tuple[str, ...]  # mesh axes that one array axis is sharded over

# Where an array is stored: parameters, gradients, moments. A list has alternatives, of which the first that divides counts.
STORED: dict[str, MeshAxes | list[MeshAxes]] = {
    "embed": ("fsdp", "expert", "pipe"),
    "expert_embed": ("fsdp", "pipe"),  # of the routed experts' weights, whose first axis already takes `expert`
    "embed_in": ("fsdp", "expert", "tensor", "pipe"),  # of the embedding, where tokens travel rather than the table
    "latent": [("fsdp", "expert", "pipe"), ("fsdp", "pipe"), ("fsdp",), ("pipe",), ()],  # small, of any size
    "experts": ("expert",),
    "heads": ("tensor",),
    "ffn": ("tensor",),
    "moe_ffn": ("tensor",),
    "vocab": ("tensor",),
}
# Axes of a weight that stay sharded while its layer runs, and those of activations. `sequence` is the length between
# blocks. All else, a weight's `embed` above all, is not sharded.
COMPUTED: dict[str, MeshAxes] = {
    "experts": ("expert",),
    "heads": ("tensor",),
    "ffn": ("tensor",),
    "vocab": ("tensor",),
    "batch": ("fsdp", "expert"),
    "sequence": ("tensor",),
}
# Outside of a pipeline's stages (embedding, dense layers, head, MTP modules) `pipe` serves as more of `tensor`.
OUTSIDE_PIPELINE: dict[str, MeshAxes] = COMPUTED | dict.fromkeys(("heads", "ffn", "vocab", "sequence"), ("tensor", "pipe"))
# Decoding (see `serving.py`): a step's few tokens are on every device, weights stay as they are stored but for the routed
# experts, which are spread over all devices that they divide over; so are the sequences of a cache.
SERVED: dict[str, MeshAxes | list[MeshAxes]] = {
    "cache_batch": [
        ("data", "fsdp", "expert", "pipe"), ("data", "fsdp", "expert"), ("fsdp", "expert", "pipe"), ("fsdp", "expert"),
        ("expert",), ("fsdp",), ("data",), ("pipe",), (),
    ],
    "experts": [("expert", "fsdp", "pipe", "data"), ("expert", "fsdp", "pipe"), ("expert", "fsdp"), ("expert",)],
    "heads": ("tensor",),
    "ffn": ("tensor",),
    "moe_ffn": ("tensor",),
}  # fmt: skip
# An engine's decoder (see `serve/decoder.py`): weights lie as a step multiplies them and never move. Tokens are on every
# device; what they meet is split over as many devices as divide it, and sequences with their pages over all of them.
_EVERY: list[MeshAxes] = [
    ("data", "pipe", "fsdp", "expert", "tensor"), ("pipe", "fsdp", "expert", "tensor"), ("fsdp", "expert", "tensor"),
    ("expert", "tensor"), ("tensor",), (),
]  # fmt: skip
DECODED: dict[str, MeshAxes | list[MeshAxes]] = {
    "cache_batch": _EVERY[0],
    "experts": [("data", "pipe", "fsdp", "expert"), ("pipe", "fsdp", "expert"), ("fsdp", "expert"), ("expert",)],
    "moe_ffn": ("tensor",),
} | dict.fromkeys(("heads", "ffn", "vocab", "embed_in", "embed_and_hidden"), _EVERY)
BATCH = ("data", "fsdp", "expert")  # rows of a batch


def _sharded_over(
    axis: str | None, size: int, table: Mapping[str, MeshAxes | list[MeshAxes]], sizes: Mapping[str, int]
) -> MeshAxes:
    """The mesh axes (of more than one device) over which one array axis is sharded."""
    entry = table.get(axis, ()) if axis else ()
    alternatives = entry if isinstance(entry, list) else [entry]
    used = [tuple(a for a in axes if sizes[a] > 1) for axes in alternatives]
    return next((p for p in used if size % math.prod(sizes[a] for a in p) == 0), used[0])


def stored_parts(axes: tuple[str | None, ...], shape: tuple[int, ...], sizes: Mapping[str, int]) -> int:
    """Into how many parts a stored array with these logical axes is cut on a mesh of these axis `sizes`."""
    last = zip(axes, shape[len(shape) - len(axes) :], strict=True)
    return math.prod(sizes[a] for axis, size in last for a in _sharded_over(axis, size, STORED, sizes))


def spec(axes: tuple[str | None, ...], shape: tuple[int, ...], table: Mapping, mesh: Mesh | AbstractMesh) -> P:
    """The PartitionSpec of an array with these logical axes; leading axes beyond them (stacked layers) are not sharded.

    Raises `UserError` if two of them want the same mesh axis, or if one is not divided by what it is sharded over.
    """
    leading = len(shape) - len(axes)
    sharded_over = [_sharded_over(axis, size, table, mesh.shape) for axis, size in zip(axes, shape[leading:], strict=True)]
    taken = [mesh_axis for over in sharded_over for mesh_axis in over]
    for mesh_axis in taken:
        if taken.count(mesh_axis) > 1:
            both = [str(axis) for axis, over in zip(axes, sharded_over, strict=True) if mesh_axis in over]
            raise UserError(f"logical axes {' and '.join(both)} of one array both map to mesh axis {mesh_axis!r}")
    for axis, over, size in zip(axes, sharded_over, shape[leading:], strict=True):
        parts = math.prod(mesh.shape[a] for a in over)
        if size % parts:
            product = " * ".join(f"parallel.{a}={mesh.shape[a]}" for a in over)
            raise UserError(f"axis {axis} of {size} cannot be sharded over {product}; use a product among {choices(size)}")
    return P(*[None] * leading, *(over or None for over in sharded_over))


def mesh_axes(entry: str | MeshAxes | None) -> MeshAxes:
    """The mesh axes of one entry of a PartitionSpec, which keeps single names bare."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def stored_spec(variable: nnx.Variable, mesh: Mesh | AbstractMesh) -> P:
    """The spec of a parameter, or of an optimizer's array beside it."""
    return spec(variable.get_metadata("logical_axes"), variable.get_value().shape, STORED, mesh)


def is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def check(config: Config, sizes: dict[str, int]) -> None:
    """Raise `UserError` for an axis that does not divide what it would shard, with what would."""
    m, d, accum = config.model, config.data, config.train.grad_accum_steps
    data, pipe, fsdp, expert, tensor = (sizes[axis] for axis in ("data", "pipe", "fsdp", "expert", "tensor"))
    shared = m.n_shared_experts * m.moe_intermediate_size
    needs = [
        (("expert",), expert, "model.n_routed_experts", m.n_routed_experts),
        (("pipe", "tensor"), pipe * tensor, "model.num_attention_heads", m.num_attention_heads),
        (("pipe", "tensor"), pipe * tensor, "model.intermediate_size", m.intermediate_size),
        (("pipe", "tensor"), pipe * tensor, "model.n_shared_experts * model.moe_intermediate_size", shared),
        (("tensor",), tensor, "model.moe_intermediate_size", m.moe_intermediate_size),
        (("pipe", "tensor"), pipe * tensor, "model.vocab_size", m.vocab_size),
        (("pipe", "fsdp", "expert", "tensor"), pipe * fsdp * expert * tensor, "model.hidden_size", m.hidden_size),
        (("pipe", "tensor"), pipe * tensor, "data.seq_len", d.seq_len),
        (
            ("data", "fsdp", "expert"), data * fsdp * expert,
            "data.batch_size / train.grad_accum_steps", d.batch_size // accum,
        ),
    ]  # fmt: skip
    for axes, size, name, value in needs:
        if value % size:
            wrong = " * ".join(f"parallel.{axis}={sizes[axis]}" for axis in axes if sizes[axis] > 1)
            total = f"{wrong} = {size}" if wrong.count("=") > 1 else wrong
            raise UserError(f"{total} does not divide {name}={value}; use one of {choices(value)}")
    parts, tokens = config.parallel.expert_parts, d.batch_size // accum // (data * fsdp * expert) * d.seq_len // tensor
    if expert > 1 and tokens % parts:
        raise UserError(
            f"parallel.expert_parts={parts} does not divide the {tokens} tokens of a microbatch that are on a device; use one "
            f"of {choices(tokens)}"
        )
    if pipe > 1 and config.precision.controller:
        raise UserError(
            f"precision.controller=true cannot switch layers one by one in a pipeline, whose stages run as one program; use "
            f"parallel.pipe=1 (it is {pipe}) or precision.controller=false"
        )
    if pipe > 1 and m.num_moe_layers < pipe * config.parallel.pipe_chunks:
        raise UserError(
            f"parallel.pipe={pipe} * parallel.pipe_chunks={config.parallel.pipe_chunks} needs as many MoE layers, and the "
            f"model has {m.num_moe_layers}; use at most {max(m.num_moe_layers, 1)}"
        )
