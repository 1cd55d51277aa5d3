"""Sums and steps of leaves in NumPy: out of place, because what was read must not change."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jdml.communicate.pace.messages import Arrival
from jdml.communicate.pace.payload import Leaves


def moved(leaf: np.ndarray, step: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """``leaf + scale * step`` in the leaf's dtype (computed in f32 where that is narrower)."""
    if leaf.dtype.itemsize < 4:
        wide = leaf.astype(np.float32) + np.float32(scale) * step.astype(np.float32)
        out = np.asarray(wide).astype(leaf.dtype)
    elif scale == 1:
        out = np.empty_like(leaf)
        np.add(leaf, step, out=out)
    else:
        out = np.empty_like(leaf)
        np.multiply(step, scale, out=out)
        np.add(leaf, out, out=out)
    out.flags.writeable = False
    return out


def all_moved(leaves: Leaves, steps: Sequence[np.ndarray], scale: float = 1.0) -> Leaves:
    """:func:`moved`, leaf by leaf."""
    return tuple(moved(x, u, scale) for x, u in zip(leaves, steps, strict=True))


def total(many: Sequence[Leaves]) -> Leaves:
    """The sum, in the order given."""
    if len(many) == 1:
        return many[0]
    out = tuple(np.array(x) for x in many[0])
    for leaves in many[1:]:
        for x, y in zip(out, leaves, strict=True):
            np.add(x, y, out=x)
    return out


def updates(batch: Sequence[Arrival]) -> list[Leaves]:
    """What the arrivals brought."""
    return [arrival.leaves for arrival in batch]


def check_rate(name: str, value: Any) -> None:
    """Raises unless ``value`` is a finite number greater than 0."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}={value!r}: expected a finite number > 0.")
