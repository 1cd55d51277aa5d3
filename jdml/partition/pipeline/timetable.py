"""The schedule as the compiled program reads it: what each stage does in each tick, from where.

In a tick every stage does one operation, or none, and then sends what its neighbours need. What
waits lies in numbered slots of a few buffers, as many as the schedule needs at once and no more.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from jdml.partition.pipeline.schedule import Kind, Op, Orders, Placed, place

BRANCHES: tuple[Kind | None, ...] = (None, "F", "B", "W")
"""What the numbers in ``Timetable.columns["branch"]`` mean."""
COLUMNS = (
    "branch",
    "micro_batch",
    "chunk",
    "is_first",  # the model's first part: F begins with the initial part
    "is_last",  # its last part: B begins with the final part and its loss
    "input",  # slot in which F finds its input
    "kept",  # slot of what F keeps until B
    "kept_for_w",  # slot of what F keeps until W
    "crossing",  # slot of what B leaves for W
    "gradient",  # slot in which B finds its output's gradient (the last part: its output)
    "input_arrives",  # slot for what the stage before sent in this tick, or -1
    "gradient_arrives",  # slot for what the stage after sent in this tick, or -1
    "output_stays",  # slot for the last part's own output, among the gradients, or -1
)


class Timetable(NamedTuple):
    """What each stage does in each tick.

    Attributes:
      columns: Of each name in ``COLUMNS``, int32 ``[ticks, stages]``.
      slots: Slots of each buffer: ``input``, ``kept``, ``kept_for_w``, ``crossing``, ``gradient``;
        as many on each stage as the fullest needs, for all run one program.
    """

    columns: dict[str, NDArray[np.int32]]
    slots: dict[str, int]

    @property
    def ticks(self) -> int:
        """How many there are."""
        return self.columns["branch"].shape[0]

    @property
    def idle(self) -> float:
        """The share of (tick, stage) pairs in which nothing is done."""
        return float(np.mean(self.columns["branch"] == 0))

    def table(self) -> NDArray[np.int32]:
        """``[ticks, stages, len(COLUMNS)]``."""
        return np.stack([self.columns[name] for name in COLUMNS], axis=-1)


def timetable(orders: Orders) -> Timetable:
    """Ticks and slots for the orders of a schedule: every operation takes one tick.

    Raises:
      ValueError: as :func:`jdml.partition.pipeline.schedule.place`.
    """
    placed = place(orders, lambda stage, op: 1.0)
    num_stages = len(orders)
    chunks = 1 + max(op.chunk for order in orders for op in order)
    last = num_stages * chunks - 1
    ticks = int(max(row[-1].end for row in placed))
    columns = {name: np.zeros((ticks, num_stages), np.int32) for name in COLUMNS}
    for name in ("input_arrives", "gradient_arrives", "output_stays"):
        columns[name][:] = -1
    at = {
        (p.op.kind, p.op.micro_batch, p.op.chunk * num_stages + stage): int(p.start)
        for stage, row in enumerate(placed)
        for p in row
    }

    # (first tick, last tick) in which a slot is taken, by buffer and stage.
    lives: dict[str, list[dict[tuple[int, int], tuple[int, int]]]] = {
        name: [{} for _ in orders]
        for name in ("input", "kept", "kept_for_w", "crossing", "gradient")
    }
    for (kind, m, part), tick in at.items():
        stage, item = part % num_stages, (m, part)
        if kind == "F" and part > 0:
            lives["input"][stage][item] = (at["F", m, part - 1] + 1, tick)
        if kind == "B":
            lives["kept"][stage][item] = (at["F", m, part], tick)
            sent = at["F", m, part] if part == last else at["B", m, part + 1]
            lives["gradient"][stage][item] = (sent + 1, tick)
        if kind == "W":
            lives["kept_for_w"][stage][item] = (at["F", m, part], tick)
            lives["crossing"][stage][item] = (at["B", m, part], tick)
    slots = {name: [_colour(lives_of) for lives_of in stages] for name, stages in lives.items()}

    for stage, row in enumerate(placed):
        for op, tick in _ticks(row):
            part = op.chunk * num_stages + stage
            item = (op.micro_batch, part)
            columns["branch"][tick, stage] = BRANCHES.index(op.kind)
            columns["micro_batch"][tick, stage] = op.micro_batch
            columns["chunk"][tick, stage] = op.chunk
            columns["is_first"][tick, stage] = part == 0
            columns["is_last"][tick, stage] = part == last
            for name, taken in slots.items():
                columns[name][tick, stage] = taken[stage].get(item, 0)
            if op.kind == "F" and part == last:
                columns["output_stays"][tick, stage] = slots["gradient"][stage].get(item, -1)
            elif op.kind == "F":
                after = (part + 1) % num_stages
                columns["input_arrives"][tick, after] = slots["input"][after][
                    op.micro_batch, part + 1
                ]
            elif op.kind == "B" and part > 0:
                before = (part - 1) % num_stages
                columns["gradient_arrives"][tick, before] = slots["gradient"][before][
                    op.micro_batch, part - 1
                ]
    most = {
        name: 1 + max((s for taken in stages for s in taken.values()), default=-1)
        for name, stages in slots.items()
    }
    return Timetable(columns, most)


def _ticks(row: Iterable[Placed]) -> Iterable[tuple[Op, int]]:
    return ((p.op, int(p.start)) for p in row)


def _colour(lives: dict[tuple[int, int], tuple[int, int]]) -> dict[tuple[int, int], int]:
    """A slot for each item such that items alive at once have different ones; as few as can be."""
    until: list[int] = []  # the last tick in which each slot is taken
    slots: dict[tuple[int, int], int] = {}
    for item, (start, end) in sorted(lives.items(), key=lambda entry: entry[1]):
        slot = next((s for s, taken in enumerate(until) if taken < start), len(until))
        if slot == len(until):
            until.append(end)
        until[slot] = end
        slots[item] = slot
    return slots
