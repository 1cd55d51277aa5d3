"""Just enough of XLA's HLO text to follow a compiled program: types, computations, calls.

Compiled programs are read as text because that is the one form that every backend hands out
(``compiled.as_text()``, also from ahead-of-time compilation). Only structure is understood here;
what a collective means is in ``compiled.py``.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple


class Array(NamedTuple):
    """One array in an HLO type: dtype as HLO spells it, and its bytes without tile padding."""

    dtype: str
    num_bytes: int


class Instruction(NamedTuple):
    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    arguments: str  # the text between the opcode's parentheses
    attributes: str  # everything after them

    def refers(self, *keys: str) -> tuple[str, ...]:
        """Names of the computations in attributes such as ``body=%f`` or ``calls={%f, %g}``."""
        names: list[str] = []
        for key in keys:
            for match in re.finditer(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes):
                names += re.findall(r"[\w.\-]+", match[1])
        return tuple(names)


class Computation(NamedTuple):
    name: str
    instructions: dict[str, Instruction]
    root: str


class Module(NamedTuple):
    computations: dict[str, Computation]
    entry: str
    num_replicas: int
    num_partitions: int


class Frame(NamedTuple):
    """A computation together with the instruction that calls it, up to the entry."""

    computation: Computation
    parent: "Frame | None" = None
    call: Instruction | None = None

    def look_up(self, name: str) -> Instruction:
        return self.computation.instructions[name]

    @property
    def root(self) -> Instruction:
        return self.look_up(self.computation.root)


_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<= ]*)\](\{[^}]*\})?")


def arrays(type_text: str) -> list[Array]:
    """The arrays of an HLO type, tuples flattened; tokens and contexts have no bytes.

    ``pred`` takes one byte. A dtype of fewer than eight bits takes a byte per element unless the
    layout says that it is packed (``E(4)``), which is how XLA stores it.
    """
    found = []
    for dtype, dims, layout in _ARRAY.findall(type_text):
        width = re.match(r"[a-z]+(\d+)", dtype)
        bits = 8 if dtype == "pred" else int(width[1]) if width else 0
        packed = re.search(r"E\((\d+)\)", layout)
        bits = int(packed[1]) if packed else max(bits, 8) if bits else 0
        size = 1
        for dim in re.findall(r"\d+", dims):
            size *= int(dim)
        found.append(Array(dtype, (size * bits + 7) // 8))
    return found


_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_COMMENT = re.compile(r"/\*.*?\*/")


def _matching(text: str, start: int) -> int:
    """Index just past the parenthesis that closes the one at ``start``; strings are skipped."""
    depth, i = 0, start
    while i < len(text):
        if text[i] == '"':
            i += 1
            while text[i] != '"':
                i += 2 if text[i] == "\\" else 1
        depth += (text[i] == "(") - (text[i] == ")")
        i += 1
        if depth == 0:
            return i
    raise ValueError(f"expected balanced parentheses in the HLO line {text[:200]!r}")


def _instruction(name: str, rest: str) -> Instruction:
    rest = _COMMENT.sub("", rest)
    end = _matching(rest, 0) if rest.startswith("(") else rest.index(" ")
    opening = rest.index("(", end)
    closing = _matching(rest, opening)
    arguments = rest[opening + 1 : closing - 1]
    operands = re.findall(r"%([\w.\-]+)", arguments)
    if not operands:  # printed without the percent sign
        operands = re.findall(r"([A-Za-z_][\w.\-]*)(?=\s*(?:,|$))", arguments)
    return Instruction(
        name,
        rest[:end],
        rest[end:opening].strip(),
        tuple(operands),
        arguments,
        rest[closing:],
    )


def parse(text: str) -> Module:
    """Read the text of a compiled program.

    Raises:
      ValueError: the text is not HLO (StableHLO of ``lowered.as_text()``, for example).
    """
    computations: dict[str, Computation] = {}
    entry = current = root = None
    instructions: dict[str, Instruction] = {}
    for line in text.splitlines():
        if current is None:
            if header := _HEADER.match(line):
                current, root, instructions = header[2], None, {}
                entry = current if header[1] else entry
        elif line.startswith("}"):
            computations[current] = Computation(current, instructions, root or "")
            current = None
        elif match := _INSTRUCTION.match(line):
            instructions[match[2]] = _instruction(match[2], match[3])
            root = match[2] if match[1] else root
    if entry is None:
        raise ValueError(
            "expected the HLO text of a compiled program (HloModule … ENTRY …), got "
            f"{text[:60]!r}…; pass jitted.lower(...).compile(), not the lowered program"
        )
    head = text[: text.index("\n")] if "\n" in text else text

    def number(key: str) -> int:
        match = re.search(rf"\b{key}=(\d+)", head)
        return int(match[1]) if match else 1

    return Module(computations, entry, number("replica_count"), number("num_partitions"))


def calls(module: Module, frame: Frame) -> Iterator[tuple[Instruction, str, str]]:
    """``(instruction, computation, role)`` for every computation that the frame may run.

    Roles: ``"condition"`` and ``"body"`` of a loop, ``"branch"``, ``"fusion"``, ``"call"``.
    Computations applied to single elements (``to_apply`` of a reduction) are left out.
    """
    for this in frame.computation.instructions.values():
        keys: dict[str, tuple[str, ...]]
        if this.opcode == "while":
            keys = {"condition": ("condition",), "body": ("body",)}
        elif this.opcode == "conditional":
            keys = {"branch": ("branch_computations", "true_computation", "false_computation")}
        elif this.opcode == "fusion":
            keys = {"fusion": ("calls",)}
        elif this.opcode == "call":
            keys = {"call": ("to_apply", "calls")}
        elif this.opcode == "async-start":
            keys = {"call": ("calls",)}
        elif this.opcode == "custom-call":
            keys = {"call": ("called_computations", "calls")}
        else:
            continue
        for role, names in keys.items():
            for name in this.refers(*names):
                yield this, name, role
