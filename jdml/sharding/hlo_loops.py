"""How often a loop of a compiled program runs, read from its HLO text.

A value is followed as ``element + offset``: element k of the nearest enclosing loop's state (None
for a plain constant) plus a known integer. A result of None means that the text does not tell.
"""

import re
from typing import TypeAlias

from jdml.sharding.hlo import Frame, Instruction, Module

_Linear: TypeAlias = tuple[int | None, int] | None
_SAME = {"copy", "copy-start", "copy-done", "bitcast", "convert", "reshape", "opt-barrier"}


def _called(module: Module, frame: Frame, call: Instruction, key: str) -> Frame:
    return Frame(module.computations[call.refers(key)[0]], frame, call)


def _is_loop(frame: Frame) -> bool:
    return frame.call is not None and frame.call.opcode == "while"


def _argument(module: Module, frame: Frame, index: int, element: int | None) -> _Linear:
    """What parameter ``index`` of the frame (or one element of it) is, seen by its caller."""
    if _is_loop(frame):
        return (-1 if element is None else element, 0)
    if frame.parent is None or frame.call is None:
        return None
    operands = frame.call.operands
    if frame.call.opcode == "conditional":
        branches = frame.call.refers("branch_computations", "true_computation", "false_computation")
        index = 1 + branches.index(frame.computation.name)
    return _linear(module, frame.parent, operands[index], element)


def _linear(module: Module, frame: Frame, name: str, element: int | None = None) -> _Linear:
    """Follow an integer scalar (or an element of a tuple) through copies, tuples, fusions, sums."""
    this = frame.look_up(name)
    op = this.opcode
    if op == "parameter":
        return _argument(module, frame, int(this.arguments), element)
    if op in _SAME and this.operands:
        return _linear(module, frame, this.operands[0], element)
    if op in ("fusion", "call"):
        inner = _called(module, frame, this, "calls" if op == "fusion" else "to_apply")
        return _linear(module, inner, inner.computation.root, element)
    if element is not None:
        if op == "tuple":
            return _linear(module, frame, this.operands[element])
        if op == "while" and _is_invariant(module, frame, this, element):
            return _linear(module, frame, this.operands[0], element)
        return None
    if op == "constant":
        integer = re.fullmatch(r"-?\d+", this.arguments.strip())
        return (None, int(integer[0])) if integer else None
    if op == "get-tuple-element":
        index = re.search(r"\bindex=(\d+)", this.attributes)
        return _linear(module, frame, this.operands[0], int(index[1])) if index else None
    if op in ("add", "subtract"):
        left = _linear(module, frame, this.operands[0])
        right = _linear(module, frame, this.operands[1])
        if left is None or right is None:
            return None
        if op == "subtract":
            return (left[0], left[1] - right[1]) if right[0] is None else None
        if left[0] is not None and right[0] is not None:
            return None
        return (right[0] if left[0] is None else left[0], left[1] + right[1])
    return None


def _next(module: Module, frame: Frame, loop: Instruction, element: int) -> _Linear:
    """Element of the loop state after one turn, in terms of the state before it."""
    body = _called(module, frame, loop, "body")
    return _linear(module, body, body.computation.root, None if element < 0 else element)


def _is_invariant(module: Module, frame: Frame, loop: Instruction, element: int) -> bool:
    return _next(module, frame, loop, element) == (element, 0)


def _known(module: Module, frame: Frame, value: _Linear) -> int | None:
    """The integer, if it can be followed to constants through loops that leave it alone."""
    if value is None or value[0] is None:
        return None if value is None else value[1]
    while not _is_loop(frame):
        if frame.parent is None:
            return None
        frame = frame.parent
    loop, outside, element = frame.call, frame.parent, value[0]
    assert loop is not None
    assert outside is not None
    if not _is_invariant(module, outside, loop, element):
        return None
    start = _linear(module, outside, loop.operands[0], None if element < 0 else element)
    base = _known(module, outside, start)
    return None if base is None else base + value[1]


_MIRRORED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "NE": "NE"}


def trip_count(module: Module, frame: Frame, loop: Instruction) -> int | None:
    """How often ``loop`` (a ``while`` in ``frame``) runs its body; None if the text does not tell.

    XLA's own ``known_trip_count`` where it is printed (CPU, GPU); otherwise (TPU) from a condition
    that compares a counter, changed by a constant in each turn, with an integer that is constant.
    """
    if known := re.search(r"known_trip_count\W+n\W+(\d+)", loop.attributes):
        return int(known[1])
    test = _called(module, frame, loop, "condition")
    compare = test.root
    while compare.opcode in ("fusion", "call", *_SAME):
        if compare.opcode in _SAME:
            compare = test.look_up(compare.operands[0])
        else:
            test = _called(
                module, test, compare, "calls" if compare.opcode == "fusion" else "to_apply"
            )
            compare = test.root
    direction = re.search(r"\bdirection=(\w+)", compare.attributes)
    if compare.opcode != "compare" or direction is None or direction[1] not in _MIRRORED:
        return None
    sides = [_linear(module, test, operand) for operand in compare.operands]
    for counter, bound, relation in (
        (sides[0], sides[1], direction[1]),
        (sides[1], sides[0], _MIRRORED[direction[1]]),
    ):
        if counter is None or counter[0] is None:
            continue
        element: int = counter[0]
        turned = _next(module, frame, loop, element)
        if turned is None or turned[0] != element or turned[1] == 0:
            continue
        begin = _linear(module, frame, loop.operands[0], None if element < 0 else element)
        first, limit = _known(module, frame, begin), _known(module, test, bound)
        if first is None or limit is None:
            return None
        return _num_steps(first + counter[1], limit, turned[1], relation)
    return None


def _num_steps(first: int, limit: int, step: int, relation: str) -> int | None:
    if relation == "NE":
        turns, rest = divmod(limit - first, step)
        return turns if rest == 0 and turns >= 0 else None
    if relation in ("GT", "GE"):
        first, limit, step = -first, -limit, -step
    limit += relation in ("LE", "GE")
    if first >= limit:
        return 0
    return -((first - limit) // step) if step > 0 else None
