"""Floating-point operations of a compiled program, loops counted as often as they run.

XLA's own count takes the body of a loop once, whatever it is told of the number of
turns. So the text of the program is read: an elementwise operation counts once an
element of its result, a product twice a pair that it multiplies.
"""

import re
from typing import NamedTuple

import numpy as np


class _Instruction(NamedTuple):
    """One line of a program: the first shape of its result, and what follows."""

    opcode: str
    dtype: str
    shape: tuple[int, ...]
    rest: str


def operations(program: str) -> int:
    """Floating-point operations that one device carries out.

    **Arguments:**

    - `program`: the text of its optimised HLO.

    **Raises:**

    `ValueError` for an instruction whose work the text does not tell.
    """
    computations, entry = _parsed(program)
    shapes = {
        name: instruction.shape
        for own in computations.values()
        for name, instruction in own.items()
    }
    known: dict[str, int] = {}

    def total(computation):
        if computation not in known:
            known[computation] = sum(map(work, computations[computation].values()))
        return known[computation]

    def work(instruction):
        opcode, _, _, rest = instruction
        if opcode in _CALLS:
            return total(_named(_CALLS[opcode], rest)) * _turns(instruction)
        if opcode in _UNKNOWN:
            raise ValueError(f"operations: the work of {opcode!r} is unknown: {rest}")
        floating = instruction.dtype.startswith(("f", "bf"))
        return _own_work(instruction, shapes) if floating else 0

    return total(entry)


def _own_work(instruction: _Instruction, shapes: dict[str, tuple[int, ...]]) -> int:
    opcode, _, shape, rest = instruction
    size = int(np.prod(shape))
    if opcode in _ELEMENTWISE:
        return size
    if opcode == "reduce":
        return max(0, int(np.prod(shapes[_operand(rest)])) - size)
    if opcode == "reduce-window":
        window = re.search(r"window=\{size=([\dx]+)", rest)
        assert window is not None
        return size * int(np.prod([int(n) for n in window[1].split("x")]))
    if opcode == "dot":
        dimensions = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)
        axes = [int(n) for n in dimensions[1].split(",") if n] if dimensions else []
        left = shapes[_operand(rest)]
        return 2 * size * int(np.prod([left[axis] for axis in axes]))
    return 0


def _parsed(program: str) -> tuple[dict[str, dict[str, _Instruction]], str]:
    computations: dict[str, dict[str, _Instruction]] = {}
    entry, own = "", {}
    for line in program.splitlines():
        head = _HEAD.match(line)
        if head is not None:
            own = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        match = _LINE.match(line)
        if match is not None:
            name, dtype, sizes, opcode, rest = match.groups()
            shape = tuple(int(n) for n in sizes.split(",") if n)
            own[name] = _Instruction(opcode, dtype, shape, rest)
    return computations, entry


def _turns(instruction: _Instruction) -> int:
    if instruction.opcode != "while":
        return 1
    turns = re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.rest)
    if turns is None:
        raise ValueError(f"operations: a loop of unknown length: {instruction.rest}")
    return int(turns[1])


def _named(attribute: str, rest: str) -> str:
    found = re.search(rf"\b{attribute}=%?([\w.-]+)", rest)
    assert found is not None
    return found[1]


def _operand(rest: str) -> str:
    """The name of the first one; some versions write its shape in front of it."""
    found = re.search(r"%([\w.-]+)", rest)
    assert found is not None
    return found[1]


_HEAD = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_LINE = re.compile(
    r"\s+(?:ROOT )?%([\w.-]+) = \(*(\w+)\[([\d,]*)\].*? ([a-z][a-z\d-]*)\((.*)$"
)
_CALLS = {"fusion": "calls", "call": "to_apply", "while": "body"}
_UNKNOWN = {"convolution", "custom-call", "conditional", "map", "scatter", "sort"}
_ELEMENTWISE = set(
    "abs add atan2 cbrt ceil cosine divide erf exponential exponential-minus-one floor "
    "log log-plus-one logistic maximum minimum multiply negate power remainder rsqrt "
    "sine sqrt subtract tan tanh".split()
)
