"""The collectives of a compiled program: their groups of devices, the mesh axes they run along, what a device sends."""

import math
import re

import numpy as np

from dsv3_jax.cost.links import Collective, sent_bytes
from dsv3_jax.plan.hlo import Computation, Instruction

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_LISTED = re.compile(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")


def kind_of(instruction: Instruction) -> str | None:
    """The kind of a collective, or of the start of an asynchronous one; None for anything else, such as its end."""
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def groups_of(attributes: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """The groups of partitions in an instruction's attributes; for a permute, pairs (source, target).

    Reads lists, iota lists, names of mesh axes and pairs; an empty list means all `devices`. Raises `ValueError` for none of
    these.
    """
    if named := _NAMED.search(attributes):
        sizes = {name.strip("' "): int(size) for name, size in (part.split("=") for part in named[1].split(","))}
        along = [list(sizes).index(name.strip("' ")) for name in named[2].split(",")]
        ids = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
        rest = [i for i in range(ids.ndim) if i not in along]
        size = math.prod(ids.shape[i] for i in along)
        return tuple(map(tuple, ids.transpose(*rest, *along).reshape(-1, size).tolist()))
    if iota := _IOTA.search(attributes):
        shape, base = ([int(x) for x in iota[i].split(",")] for i in (1, 2))
        ids = np.arange(math.prod(base)).reshape(base)
        ids = ids.transpose([int(x) for x in iota[3].split(",")]) if iota[3] else ids
        return tuple(map(tuple, ids.reshape(shape).tolist()))
    if pairs := _PAIRS.search(attributes):
        return tuple((int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs[1]))
    if listed := _LISTED.search(attributes):
        found = tuple(tuple(int(x) for x in g.split(",")) for g in re.findall(r"\{([\d,]+)\}", listed[1]))
        return found or (tuple(range(devices)),)
    raise ValueError(f"no groups in {attributes[:200]}")


def axes_of(groups: tuple[tuple[int, ...], ...], mesh: dict[str, int]) -> tuple[str, ...]:
    """The mesh axes along which members of a group differ."""
    positions = np.stack(np.unravel_index(np.array(groups), tuple(mesh.values())), -1)  # groups, members, axes
    differ = (positions != positions[:, :1]).any((0, 1))
    return tuple(axis for axis, d in zip(mesh, differ, strict=True) if d)


def read_collective(i: Instruction, inside: Computation, mesh: dict[str, int], ragged_fill: float) -> Collective:
    """The collective that an instruction of computation `inside` is.

    `ragged_fill`: the share of its buffer that a ragged exchange sends, whose rows depend on routing.
    """
    kind = kind_of(i)
    assert kind, i
    operands = [inside.instructions[name] for name in i.operands]
    groups = groups_of(i.attributes, math.prod(mesh.values()))
    ragged = kind == "ragged-all-to-all"  # whose other operands are its buffer, offsets and sizes
    carried = operands[0].bytes * ragged_fill if ragged else sum(o.bytes for o in operands)
    return Collective(i.name, kind, groups, axes_of(groups, mesh), sent_bytes(kind, carried, len(groups[0])), i.op_name)
