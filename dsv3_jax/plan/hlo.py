"""Reading compiled HLO text: computations, instructions in their scheduled order, shapes, trip counts of loops.

XLA has no Python interface to a compiled program's instructions, so its text is parsed; the grammar is that of
`HloModule::ToString`. Nothing here depends on what the program computes.
"""

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "s64": 64,
    "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128, "token": 0, "opaque": 0,
    "f4e2m1fn": 4, "f8e4m3fn": 8, "f8e5m2": 8, "f8e4m3": 8, "f8e4m3b11fnuz": 8, "f8e4m3fnuz": 8, "f8e5m2fnuz": 8, "f8e3m4": 8,
    "f8e8m0fnu": 8,
}  # fmt: skip
_ARRAY = re.compile(r"\b(" + "|".join(sorted(BITS, key=len, reverse=True)) + r")\[([\d,<=]*)\](?:\{([^}]*)\})?")
_COMMENT = re.compile(r"/\*.*?\*/")
_NAME = re.compile(r"%([\w.\-]+)")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_BEGINS = re.compile(r"^(?:  (?:ROOT )?%?[\w.\-]+ = |(?:ENTRY )?%?[\w.\-]+ \(.*\{$|\}(?:$|,)|HloModule|$)")
_MODULE = re.compile(r'\bmodule = "[^"]*"')  # a GPU kernel's own program, hundreds of kilobytes
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|called_computations)=\{?%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+))")


@dataclass(frozen=True)
class Array:
    """An array of a shape: HLO's element type and dimensions."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0  # memory space: 0 is the device's memory, 1 a TPU's VMEM

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        return -(-self.size * BITS[self.dtype] // 8)


@functools.lru_cache(maxsize=100_000)
def arrays_of(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape, a tuple's in order."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        space = re.search(r"S\((\d+)\)", layout)
        found.append(Array(dtype, tuple(int(d.lstrip("<=")) for d in dims.split(",") if d), int(space[1]) if space else 0))
    return tuple(found)


@dataclass(frozen=True)
class Instruction:
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]  # names
    arguments: str  # the text between the parentheses: the value of a constant, the number of a parameter
    attributes: str
    root: bool

    @property
    def arrays(self) -> tuple[Array, ...]:
        return arrays_of(self.shape)

    @property
    def bytes(self) -> int:
        return sum(a.bytes for a in self.arrays)

    @property
    def op_name(self) -> str:
        """The scopes and the primitive of the traced program that it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def called(self, key: str) -> str | None:
        """The computation that an attribute names, such as body, condition, calls or to_apply."""
        return next((name for k, name in _CALLED.findall(self.attributes) if k == key), None)

    @property
    def branches(self) -> list[str]:
        """The computations of a conditional."""
        found = _BRANCHES.findall(self.attributes)
        return [name.strip().lstrip("%") for listed, one in found for name in (listed or one).split(",")]


@dataclass
class Computation:
    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)  # in execution order if the program is scheduled

    @property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.root)

    def parameter(self, number: int) -> Instruction:
        return next(i for i in self.instructions.values() if i.opcode == "parameter" and i.arguments == str(number))

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())


@dataclass
class Program:
    computations: dict[str, Computation]
    entry: str
    scheduled: bool

    def trip_count(self, loop: Instruction, inside: Computation) -> int | None:
        """How often a `while` of computation `inside` runs its body; None if that depends on data or is not recognised."""
        assert loop.opcode == "while", loop
        known = re.search(r'"?known_trip_count"?:\s*\{\s*"?n"?:\s*"?(\d+)', loop.attributes)
        if known:
            return int(known[1])
        return _counted(self, loop, inside)


def _closing(text: str, begin: int) -> int:
    """Index of the parenthesis that closes the one at `begin`."""
    depth = 0
    for i in range(begin, len(text)):
        if text[i] == "(":
            depth += 1
        elif text[i] == ")":
            depth -= 1
            if not depth:
                return i
    raise ValueError(f"no closing parenthesis: {text[begin : begin + 200]}")


def _parse_instruction(line: str) -> Instruction | None:
    head = _INSTRUCTION.match(line)
    if not head:
        return None
    line = _COMMENT.sub("", _MODULE.sub("", line))
    begin = head.end()
    end = _closing(line, begin) + 1 if line[begin] == "(" else line.index(" ", begin)
    opcode = _OPCODE.match(line, end)
    if not opcode:
        return None
    close = _closing(line, opcode.end() - 1)
    arguments = line[opcode.end() : close]
    return Instruction(
        head[2], line[begin:end], opcode[1], tuple(_NAME.findall(arguments)), arguments, line[close + 1 :], bool(head[1])
    )


def _logical_lines(text: str) -> Iterator[str]:
    """Lines with their continuations: attributes may have line breaks, and a continuation begins like no other line."""
    pending = ""
    for line in text.splitlines():
        if _BEGINS.match(line):
            yield pending
            pending = line
        else:
            pending += line
    yield pending


def parse(text: str) -> Program:
    """Parse the text of an HLO module. Raises `ValueError` for any other text."""
    if not text.startswith("HloModule"):
        raise ValueError(f"no HLO module: {text[:80]!r}")
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in _logical_lines(text):
        if begins := _COMPUTATION.match(line):
            current = computations[begins[2]] = Computation(begins[2])
            entry = begins[2] if begins[1] else entry
        elif current and (instruction := _parse_instruction(line)):
            current.instructions[instruction.name] = instruction
    if not entry:
        raise ValueError("the HLO module has no entry computation")
    return Program(computations, entry, "is_scheduled=true" in text[: text.index("\n")])


# Trip counts. A value is an int or an expression over the carried tuple: ("element", k), ("add", a, b), ("compare", ...).

_THROUGH = {"copy", "convert", "bitcast", "reshape", "copy-start", "copy-done", "broadcast", "optimization-barrier"}
_DIRECTIONS = {"LT": 0, "LE": 1}


def _value(program: Program, computation: Computation, name: str, bound: dict[str, Any], depth: int = 0) -> Any:
    """What an instruction computes, if it is among what loops count with; else None."""
    i = computation.instructions[name]
    if depth > 40:
        return None

    def operand(n: int):
        return _value(program, computation, i.operands[n], bound, depth + 1)

    if i.name in bound:
        return bound[i.name]
    if i.opcode == "constant":
        return int(i.arguments) if re.fullmatch(r"-?\d+", i.arguments) else None
    if i.opcode in _THROUGH:
        return operand(0)
    if i.opcode == "tuple":
        return ("tuple", *(operand(n) for n in range(len(i.operands))))
    if i.opcode == "get-tuple-element":
        of, index = operand(0), re.search(r"index=(\d+)", i.attributes)
        if index and isinstance(of, tuple) and of[0] == "tuple":
            return of[1 + int(index[1])]
        return ("element", int(index[1])) if index and of == "carried" else None
    if i.opcode in ("add", "subtract"):
        a, b = operand(0), operand(1)
        if isinstance(a, int) and isinstance(b, int):
            return a + b if i.opcode == "add" else a - b
        return None if a is None or b is None else (i.opcode, a, b)
    if i.opcode == "compare":
        direction = re.search(r"direction=(\w+)", i.attributes)
        return ("compare", direction[1] if direction else "", operand(0), operand(1))
    called = i.called("calls") or i.called("to_apply")
    if i.opcode in ("fusion", "call") and called:
        inner = program.computations[called]
        given = {inner.parameter(n).name: operand(n) for n in range(len(i.operands))}
        return _value(program, inner, inner.root.name, given, depth + 1)
    return None


def _counted(program: Program, loop: Instruction, inside: Computation) -> int | None:
    """Trip count of a loop that counts up by a constant from a constant to a constant; None for other loops."""
    condition, body = (program.computations[loop.called(key) or ""] for key in ("condition", "body"))
    test = _value(program, condition, condition.root.name, {condition.parameter(0).name: "carried"})
    if not (isinstance(test, tuple) and test[0] == "compare" and test[1] in _DIRECTIONS):
        return None
    _, direction, counter, limit = test
    init = _value(program, inside, loop.operands[0], {})
    stepped = _value(program, body, body.root.name, {body.parameter(0).name: "carried"})
    if not (isinstance(init, tuple) and isinstance(stepped, tuple) and isinstance(counter, tuple) and counter[0] == "element"):
        return None
    if isinstance(limit, tuple) and limit[0] == "element":  # a limit that is carried along
        limit = init[1 + limit[1]] if stepped[1 + limit[1]] == limit else None
    begin, after = init[1 + counter[1]], stepped[1 + counter[1]]
    steps = [n for n in after[1:] if isinstance(n, int)] if isinstance(after, tuple) and counter in after[1:] else []
    if not isinstance(limit, int) or not isinstance(begin, int) or after[0] != "add" or len(steps) != 1 or steps[0] <= 0:
        return None
    return max(0, -(-(limit + _DIRECTIONS[direction] - begin) // steps[0]))
