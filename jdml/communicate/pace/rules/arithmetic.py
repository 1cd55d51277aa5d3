"""Sums and steps of leaves in NumPy: out of place, because what was read must not change.

Large leaves are shared among threads, for NumPy computes without holding the interpreter: half of
the time for 50 MB is memory that the system clears, and two cores take 25 ms where one takes 60.
"""

import functools
import itertools
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from jdml.communicate.pace.messages import Arrival
from jdml.communicate.pace.payload import Leaves, empty_like

_LARGE = 1 << 20
"""Bytes of a leaf from which it is worth waking a thread."""


def moved(leaf: np.ndarray, step: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """``leaf + scale * step`` in the leaf's dtype (computed in f32 where that is narrower)."""
    out = np.empty_like(leaf)
    _move(leaf, step, scale, out)
    out.flags.writeable = False
    return out


def all_moved(
    leaves: Leaves,
    steps: Sequence[np.ndarray],
    scale: float = 1.0,
    room: Callable[[Leaves], Leaves] = empty_like,
) -> Leaves:
    """:func:`moved`, leaf by leaf; large ones into arrays that ``room`` gives."""
    if all(x.nbytes < _LARGE for x in leaves):
        return tuple(moved(x, u, scale) for x, u in zip(leaves, steps, strict=True))
    outs = room(leaves)
    parts = [
        (x[i:j], u[i:j], scale, out[i:j])
        for x, u, out in zip(
            map(_with_dim, leaves), map(_with_dim, steps), map(_with_dim, outs), strict=True
        )
        for i, j in _cuts(x)
    ]
    list(_threads().map(lambda part: _move(*part), parts))
    for out in outs:
        out.flags.writeable = False
    return outs


def copy_all(leaves: Sequence[np.ndarray], outs: Sequence[np.ndarray]) -> None:
    """Copies arrays into others of their shapes."""
    parts = [
        (x[i:j], out[i:j])
        for x, out in zip(map(_with_dim, leaves), map(_with_dim, outs), strict=True)
        for i, j in _cuts(x)
    ]
    list(_threads().map(lambda part: np.copyto(part[1], part[0]), parts))


def _move(leaf: np.ndarray, step: np.ndarray, scale: float, out: np.ndarray) -> None:
    if leaf.dtype.itemsize < 4:
        wide = leaf.astype(np.float32) + np.float32(scale) * step.astype(np.float32)
        out[...] = wide.astype(leaf.dtype)
    elif scale == 1:
        np.add(leaf, step, out=out)
    else:
        np.multiply(step, scale, out=out)
        np.add(leaf, out, out=out)


def _with_dim(x: np.ndarray) -> np.ndarray:
    return x if x.ndim else x[None]


def _cuts(x: np.ndarray) -> list[tuple[int, int]]:
    """Ranges of dim 0, of about ``_LARGE`` bytes each."""
    num = max(1, min(len(x), x.nbytes // _LARGE))
    ends = [len(x) * k // num for k in range(num + 1)]
    return list(itertools.pairwise(ends))


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="server arithmetic")


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
