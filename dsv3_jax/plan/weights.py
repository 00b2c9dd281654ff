"""Which collectives of a compiled serving step carry weights: there should be none."""

from typing import Any

from dsv3_jax.plan.communication import kind_of
from dsv3_jax.plan.hlo import Instruction, Program

# What moves numbers and changes none; a sum, a product or a lookup gives something else than a weight.
_MOVES = {
    "bitcast", "bitcast-convert", "convert", "copy", "reshape", "transpose", "slice", "dynamic-slice", "dynamic-update-slice",
    "concatenate", "pad", "select", "broadcast", "reverse", "optimization-barrier", "opt-barrier", "copy-start", "copy-done",
    "slice-start", "slice-done",
}  # fmt: skip
_WEIGHTS = "weights["  # names of a step's arguments that are (serve/programs.py)


def moved_weights(program: Program) -> dict[str, set[str]]:
    """Collectives by name, and the arguments of the step, weights, that reach them unchanged or in parts.

    Follows arguments through all that only moves them, through fusions, calls, loops and branches.
    """
    found: dict[str, set[str]] = {}
    _follow(program, program.entry, [], found)
    return found


def _follow(program: Program, name: str, given: list[Any], found: dict[str, set[str]]) -> Any:
    """The weights in a computation's result: a set, or a list for a tuple. `given` are those in its arguments."""
    values: dict[str, Any] = {}
    computation = program.computations[name]
    for i in computation:
        values[i.name] = _weights_in(program, i, [values.get(o, set()) for o in i.operands], given, found)
    return values[computation.root.name]


def _weights_in(program: Program, i: Instruction, operands: list[Any], given: list[Any], found: dict[str, set[str]]) -> Any:
    if i.opcode == "parameter":
        number = int(i.arguments)
        if given:
            return given[number]
        return {i.op_name} if i.op_name.startswith(_WEIGHTS) else set()
    if i.opcode == "tuple":
        return operands
    if i.opcode == "get-tuple-element":
        index = int(i.attributes.partition("index=")[2].partition(",")[0].split()[0])
        return operands[0][index] if isinstance(operands[0], list) else operands[0]
    if i.opcode == "while":
        body = i.called("body") or ""
        return _both(operands[0], _follow(program, body, [operands[0]], found))
    if i.opcode == "conditional":
        results = [_follow(program, b, [operands[n]], found) for n, b in enumerate(i.branches, 1)]
        while len(results) > 1:
            results.append(_both(results.pop(), results.pop()))
        return results[0]
    if kind_of(i):
        carried = _flat(operands)
        if carried:
            found.setdefault(i.name, set()).update(carried)
        return carried
    called = i.called("calls") or (i.called("to_apply") if i.opcode == "call" else None)
    if called in program.computations and i.opcode != "custom-call":
        return _follow(program, called, operands or [set()], found)
    if i.opcode in _MOVES or i.opcode.endswith(("-done", "-update")):
        return _flat(operands)
    return set()


def _flat(value: Any) -> set[str]:
    return set().union(*map(_flat, value)) if isinstance(value, list) else value


def _both(a: Any, b: Any) -> Any:
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [_both(x, y) for x, y in zip(a, b, strict=True)]
    return _flat(a) | _flat(b)
