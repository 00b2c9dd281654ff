"""How often this package's loops over data run: what their programs do not say, and balanced (or given) loads do.

They are known by the names of the functions that they come from.
"""

import re
from collections.abc import Callable

from dsv3_jax.parallel.experts import EXCHANGE, MORE_ROUNDS
from dsv3_jax.plan.hlo import Computation, Instruction, Program

_EXCHANGE = re.compile(rf"/{EXCHANGE}/while$")  # across nodes, and inside one
_MORE = re.compile(rf"/{MORE_ROUNDS}/while$")
_BLOCKS = "grouped_swiglu_blocked"  # pallas_kernels/grouped_swiglu/blocked.py: of rows of an expert
_SIZES = (512, 256, 64, 8)  # rows
_KEYS = "causal_attention_blockwise"  # pallas_kernels/causal_attention/blockwise.py: of keys before a block of queries
Told = Callable[[Instruction, Computation], float | None]


def rounds_of(program: Program, rows: float, exchanges: int, parts: int) -> Told:
    """Of a loop and its body: how often it runs; None for one that is not this package's.

    `exchanges`: rounds of each of the `parts` of a device's tokens (parallel/experts.py); of several parts, the first round is
    no loop. `rows`: that a device's experts get in a round, in blocks of several sizes with a loop each, of which balanced
    loads fill the largest. A block of queries sees as many blocks of keys as stand before it and one, half of them on average.
    """
    loops = [(i, c) for c in program.computations.values() for i in c if i.opcode == "while"]
    inside = {i.name: c for i, c in loops}
    around = {i.called("body"): (i, c) for i, c in loops}
    largest: dict[str, int] = {}
    for i, c in loops:
        if _BLOCKS in i.op_name:
            largest[c.name] = max(largest.get(c.name, 0), _block(program, program.computations[i.called("body") or ""]))

    def told(loop: Instruction, body: Computation) -> float | None:
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

    return told


def _block(program: Program, body: Computation) -> int:
    """Rows of the block that a loop's body works on: the largest size of a block that all its products have as a side."""
    sides = [
        {d for name in (i.name, i.operands[0]) for d in c.instructions[name].arrays[0].dims if d > 1}
        for c in _reached(program, body)
        for i in c
        if i.opcode == "dot"
    ]
    return max(set.intersection(*sides) & set(_SIZES), default=0) if sides else 0


def _reached(program: Program, computation: Computation) -> list[Computation]:
    """It and what its fusions call."""
    called = [c for i in computation if i.opcode == "fusion" and (c := i.called("calls"))]
    return [computation, *(inner for name in called for inner in _reached(program, program.computations[name]))]
