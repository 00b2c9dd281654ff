"""How often loops run whose trip count depends on data, for balanced (or given) loads of the experts.

The loops of this package are recognised by the names of the functions that they come from.
"""

import re
from collections.abc import Callable

from dsv3_jax.parallel.experts import EXCHANGE, MORE_ROUNDS
from dsv3_jax.plan.hlo import Computation, Instruction, Program

_EXCHANGE = re.compile(rf"/{EXCHANGE}/while$")  # across nodes, and inside one
_MORE = re.compile(rf"/{MORE_ROUNDS}/while$")
_BLOCKS = "grouped_swiglu_blocked"  # pallas_kernels/grouped_swiglu/blocked.py: a loop over blocks of an expert's rows
_SIZES = (512, 256, 64, 8)  # rows of a block
_KEYS = "causal_attention_blockwise"  # pallas_kernels/causal_attention/blockwise.py: a loop over blocks of keys
Rounds = Callable[[Instruction, Computation], float | None]


def rounds_of(program: Program, rows: float, exchanges: int, parts: int) -> Rounds:
    """A function of a loop and its body: how often the loop runs, or None for a loop that is not this package's.

    Args:
        rows: Rows that a device's experts get in a round. They come in blocks of several sizes with a loop each, of which
            balanced loads fill the largest.
        exchanges: Rounds of exchange for each part of a device's tokens (parallel/experts.py).
        parts: How many parts; with several, the first round is no loop.

    A block of queries attends to its own block of keys and all before it: on average, to half of them.
    """
    loops = [(i, c) for c in program.computations.values() for i in c if i.opcode == "while"]
    inside = {i.name: c for i, c in loops}
    around = {i.called("body"): (i, c) for i, c in loops}
    largest: dict[str, int] = {}
    for i, c in loops:
        if _BLOCKS in i.op_name:
            largest[c.name] = max(largest.get(c.name, 0), _block(program, program.computations[i.called("body") or ""]))

    def rounds(loop: Instruction, body: Computation) -> float | None:
        here = inside[loop.name].name
        if _BLOCKS in loop.op_name:
            size = _block(program, body)
            return rows / size if size and size == largest[here] else 0.0
        if _KEYS in loop.op_name and here in around:
            blocks = program.trip_count(*around[here])
            return (blocks + 1) / 2 if blocks else None
        if _MORE.search(loop.op_name):
            return float((exchanges - 1) * parts)
        return float(exchanges) if _EXCHANGE.search(loop.op_name) else None

    return rounds


def _block(program: Program, body: Computation) -> int:
    """Rows of the block that a loop's body works on: the largest block size that all its products have as a dimension."""
    sides = [
        {d for name in (i.name, i.operands[0]) for d in c.instructions[name].arrays[0].dims if d > 1}
        for c in _reached(program, body)
        for i in c
        if i.opcode == "dot"
    ]
    return max(set.intersection(*sides) & set(_SIZES), default=0) if sides else 0


def _reached(program: Program, computation: Computation) -> list[Computation]:
    """The computation and those that its fusions call."""
    called = [c for i in computation if i.opcode == "fusion" and (c := i.called("calls"))]
    return [computation, *(inner for name in called for inner in _reached(program, program.computations[name]))]
