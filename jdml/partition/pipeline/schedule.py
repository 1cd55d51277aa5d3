"""What a pipeline's schedule is: for each stage, which operation after which.

A model of L layers is cut into ``num_stages × chunks`` parts in order; stage s holds parts
``s, num_stages + s, 2 num_stages + s, …``, its chunks. For every micro-batch and chunk a stage does

- ``F``: the chunk's forward pass;
- ``B``: its backward pass, or, where the schedule splits it, the input's gradient alone;
- ``W``: the parameters' gradient, where it is split off; nothing waits for it.

``F`` needs the part before it, ``B`` the part after it and its own ``F``, ``W`` its own ``B``.
A schedule is the *order* of each stage's operations. When each runs follows from what it takes:
:func:`place` gives the times for any durations, and with unit durations the ticks of the compiled
program.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

Kind = Literal["F", "B", "W"]


class Op(NamedTuple):
    """One operation of a stage: its kind, on which micro-batch, of which of the stage's chunks."""

    kind: Kind
    micro_batch: int
    chunk: int = 0


Orders = list[list[Op]]
"""``orders[stage]``: the stage's operations, first to last."""


class Placed(NamedTuple):
    """An operation and when it runs: from ``start`` to before ``end``."""

    op: Op
    start: float
    end: float


@dataclass(frozen=True)
class Schedule(ABC):
    """Base of the schedules; equal ones share compiled programs.

    Attributes:
      chunks: Parts of the model that each stage holds.
      splits_backward: Whether the parameters' gradients are operations of their own (``W``).
    """

    chunks: int = 1
    splits_backward: ClassVar[bool] = False

    @property
    @abstractmethod
    def name(self) -> str:
        """As tables and pictures call it."""

    @abstractmethod
    def orders(self, num_stages: int, micro_batches: int) -> Orders:
        """Each stage's operations in order."""

    @abstractmethod
    def bubble(
        self, num_stages: int, micro_batches: int, t_f: float, t_b: float, t_w: float
    ) -> float:
        """Closed form of the fraction of a stage's time in which it waits, with free transfers.

        Args:
          num_stages: Stages.
          micro_batches: Micro-batches in a step.
          t_f: Time of a whole stage's forward pass of one micro-batch.
          t_b: Of its input's gradient.
          t_w: Of its parameters' gradient.
        """

    @abstractmethod
    def peak_activations(self, num_stages: int, micro_batches: int) -> list[int]:
        """Closed form of the most chunk activations that each stage holds at once."""

    def check(self, num_stages: int, micro_batches: int) -> None:
        """Raises unless the schedule can run so many micro-batches over so many stages."""
        if num_stages < 1 or micro_batches < 1:
            raise ValueError(
                f"{self.name}: num_stages={num_stages} and micro_batches={micro_batches}; expected "
                "at least 1 of each."
            )
        if micro_batches < num_stages:
            raise ValueError(
                f"{self.name}: {micro_batches} micro-batches for {num_stages} stages; a stage "
                f"would never be busy beside all the others. Use micro_batches={num_stages} or "
                "more, or fewer stages."
            )


def place(
    orders: Orders,
    duration: Callable[[int, Op], float],
    transfer: float = 0.0,
) -> list[list[Placed]]:
    """When each operation runs if every stage starts its next one as soon as it can.

    Args:
      orders: Each stage's operations, in order.
      duration: ``(stage, op) -> time``, over 0.
      transfer: Time from the end of an operation until the neighbour has what it sent.

    Returns:
      ``[stage][i]``: the i-th operation of the stage with its times.

    Raises:
      ValueError: an operation is missing, occurs twice, or waits for one that never comes.
    """
    chunks = 1 + max(op.chunk for order in orders for op in order)
    last = len(orders) * chunks - 1
    done: dict[tuple[Kind, int, int], float] = {}
    placed: list[list[Placed]] = [[] for _ in orders]
    free = [0.0] * len(orders)
    progress = True
    while progress:
        progress = False
        for stage, order in enumerate(orders):
            while len(placed[stage]) < len(order):
                op = order[len(placed[stage])]
                part = op.chunk * len(orders) + stage
                start = free[stage]
                for kind, needed in needs(op.kind, part, last):
                    at = done.get((kind, op.micro_batch, needed))
                    if at is None:
                        break
                    start = max(start, at if needed == part else at + transfer)
                else:
                    if (op.kind, op.micro_batch, part) in done:
                        raise ValueError(f"stage {stage}: {op} occurs twice.")
                    end = start + duration(stage, op)
                    done[op.kind, op.micro_batch, part] = free[stage] = end
                    placed[stage].append(Placed(op, start, end))
                    progress = True
                    continue
                break
    for stage, order in enumerate(orders):
        if len(placed[stage]) < len(order):
            raise ValueError(
                f"stage {stage} waits for ever before {order[len(placed[stage])]}: what it needs "
                "comes later in another stage's order, which waits for it, or is missing."
            )
    return placed


def needs(kind: Kind, part: int, last: int) -> Sequence[tuple[Kind, int]]:
    """``(kind, part)`` of the operations, on the same micro-batch, that must be done before."""
    if kind == "F":
        return [("F", part - 1)] if part else []
    if kind == "B":
        after: list[tuple[Kind, int]] = [("B", part + 1)] if part < last else []
        return [("F", part), *after]
    return [("B", part)]


def in_flight(order: Sequence[Op], until: Kind) -> int:
    """The most forward passes whose ``until`` ("B" or "W") is still to come, at any time."""
    held = peak = 0
    for op in order:
        # What an operation frees is free after it: it was there while it ran.
        held += op.kind == "F"
        peak = max(peak, held)
        held -= op.kind == until
    return peak
