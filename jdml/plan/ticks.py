"""A pipeline's schedule in ticks, as the compiled program runs it, and what it makes a step wait.

In a tick each stage runs one operation of its schedule, or none, and then meets its neighbours; so
a tick is as long as its longest operation, and what it sends, every stage sends.
"""

import functools
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from jdml.partition.pipeline.timetable import BRANCHES, timetable
from jdml.plan.layout import Layout, schedule_of


class Ticks(NamedTuple):
    """Of one step.

    Attributes:
      kinds: int ``[ticks, stages]``, indices into ``BRANCHES``: nothing, F, B, W.
      forward, back: Ticks in which outputs go forward, and in which gradients go back.
      slots: Buffers that each stage has, by name: ``input``, ``gradient``, ``kept`` and, for
        schedules that split the backward pass, ``kept_for_w`` and ``crossing``.
      chunks: Parts of a stage.
    """

    kinds: NDArray[np.int32]
    forward: int
    back: int
    slots: dict[str, int]
    chunks: int

    @property
    def number(self) -> int:
        return int(self.kinds.shape[0])

    @property
    def num_stages(self) -> int:
        return int(self.kinds.shape[1])

    def runs(self, kind: int) -> int:
        """How often a stage runs operations of a kind."""
        return int(np.sum(self.kinds[:, 0] == kind))

    def waiting(self, forward: float, backward: float) -> float:
        """Seconds (or any unit) in which a stage waits in a step.

        Args:
          forward: That a stage works on F in a step, all micro-batches together.
          backward: On B, with W where the schedule splits it off: half of it then.
        """
        splits = bool(self.runs(BRANCHES.index("W")))
        times = [0.0, forward, backward / (2 if splits else 1), backward / 2 if splits else 0.0]
        each = np.array([t / max(self.runs(kind), 1) for kind, t in enumerate(times)])
        span = float(np.sum(np.max(each[self.kinds], axis=1)))
        return max(span - forward - backward, 0.0)


def ticks_of(layout: Layout) -> Ticks:
    """The ticks of the layout's pipeline."""
    return _ticks_of(layout.schedule, layout.stage, layout.micro_batches)


@functools.lru_cache(maxsize=512)
def _ticks_of(schedule: str, num_stages: int, micro_batches: int) -> Ticks:
    made = schedule_of(schedule)
    table = timetable(made.orders(num_stages, micro_batches))
    forward, back = (
        int(np.sum((table.columns[name] >= 0).any(axis=1)))
        for name in ("input_arrives", "gradient_arrives")
    )
    return Ticks(table.columns["branch"], forward, back, table.slots, made.chunks)
