"""Sums and means: what an update is in plain SGD."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from jdml.communicate.pace.messages import Arrival
from jdml.communicate.pace.payload import Leaves
from jdml.communicate.pace.rules.arithmetic import all_moved, total, updates
from jdml.communicate.pace.rules.base import Apply, Book


@dataclasses.dataclass(frozen=True)
class Add(Apply):
    """See :func:`add` and :func:`average`."""

    scale: float
    mean: bool

    def __call__(
        self, leaves: Leaves, state: Any, batch: Sequence[Arrival], book: Book
    ) -> tuple[Leaves, Any]:
        scale = self.scale / len(batch) if self.mean else self.scale
        return all_moved(leaves, total(updates(batch)), scale, book.room), state


def add(scale: float = 1.0) -> Add:
    """``w <- w + scale * sum_k u_k`` over the updates that make this version.

    With ``scale = 1 / N`` the N workers move the model as far in a clock as one worker's mean step,
    at every staleness.

    Args:
      scale: Finite; ``-lr`` where workers push gradients.
    """
    return Add(_checked("add", scale), mean=False)


def average(scale: float = 1.0) -> Add:
    """``w <- w + (scale / n) sum_k u_k`` over the n updates that make this version.

    Synchronously, the mean step; where updates come alone, each counts whole.
    """
    return Add(_checked("average", scale), mean=True)


def _checked(name: str, scale: float) -> float:
    if not math.isfinite(scale) or scale == 0:
        raise ValueError(f"{name}({scale!r}): expected a finite scale other than 0.")
    return scale
