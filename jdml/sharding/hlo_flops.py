"""Floating point operations of matrix products and convolutions in HLO text.

A product of two numbers and its sum are two operations. What is elementwise, or in a kernel whose
inside HLO does not show (``custom-call``), counts nothing.
"""

import math
import re

import numpy as np

from jdml.sharding.hlo import Computation, Frame, Instruction, Module, calls
from jdml.sharding.hlo_loops import trip_count

Dims = tuple[int, ...]


def flops(module: Module, frame: Frame, this: Instruction) -> int:
    """Of one instruction of a frame, with all that it calls; exact, padding left out.

    A loop counts as often as it runs (once, where the text does not tell), of branches the
    greatest.
    """
    if this.opcode == "dot":
        return _dot(frame.computation, this)
    if this.opcode == "convolution":
        return _convolution(frame.computation, this)
    total, branches = 0, [0]
    for caller, name, role in calls(module, frame):
        if caller.name != this.name:
            continue
        inside = flops_of(module, Frame(module.computations[name], frame, this))
        if role == "branch":
            branches.append(inside)
        elif role == "body":
            turns = trip_count(module, frame, this)
            total += inside * (1 if turns is None else turns)
        else:
            total += inside
    return total + max(branches)


def flops_of(module: Module, frame: Frame) -> int:
    """Of all instructions of a frame; ``Frame(module.computations[module.entry])``: a call."""
    return sum(flops(module, frame, i) for i in frame.computation.instructions.values())


def _dims(type_text: str) -> Dims:
    match = re.search(r"[a-z]\w*\[([\d,]*)\]", type_text)
    assert match is not None
    return tuple(int(d) for d in re.findall(r"\d+", match[1]))


def _operand_dims(computation: Computation, this: Instruction) -> list[Dims]:
    return [_dims(computation.instructions[name].type) for name in this.operands]


def _dot(computation: Computation, this: Instruction) -> int:
    left = _operand_dims(computation, this)[0]
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", this.attributes)
    dims = [] if contracted is None else [int(d) for d in re.findall(r"\d+", contracted[1])]
    return 2 * math.prod(_dims(this.type)) * math.prod(left[d] for d in dims)


def _convolution(computation: Computation, this: Instruction) -> int:
    """What XLA's own cost analysis counts: the taps that fall on the input, not on its padding."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", this.attributes)
    assert labels is not None
    image, kernel = _operand_dims(computation, this)
    output = _dims(this.type)
    products = kernel[labels[2].index("i")]
    products *= output[labels[3].index("b")] * output[labels[3].index("f")]
    window = re.search(r"window=\{([^}]*)\}", this.attributes)
    options = dict(o.split("=") for o in window[1].split()) if window else {}
    for number in range(len(output) - 2):

        def option(key: str, default: str, number: int = number) -> str:
            return options[key].split("x")[number] if key in options else default

        label = str(number)
        size, stride = int(option("size", "1")), int(option("stride", "1"))
        low = int(option("pad", "0_0").split("_")[0])
        spread, apart = int(option("lhs_dilate", "1")), int(option("rhs_dilate", "1"))
        length = (image[labels[1].index(label)] - 1) * spread + 1
        starts = np.arange(output[labels[3].index(label)]) * stride - low
        taps = 0
        for tap in range(size):
            at = starts + tap * apart
            taps += int(np.count_nonzero((at >= 0) & (at < length) & (at % spread == 0)))
        products *= taps
    return 2 * products
