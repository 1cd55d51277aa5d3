"""One kind of collective of a step, and how many bytes the usual ones send."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Exchange:
    """One kind of collective of a step.

    Attributes:
      what: In words.
      axis: Mesh axis along which the chips differ that exchange; of several ``"fsdp+seq"``.
      sent_bytes: What a chip sends in a step, bandwidth-optimal.
      hidden: Runs beside the products, so that only what takes longer than these is waited for.
      times: How often it runs in a step.
      pattern: ``"ring"`` where all go round all (sums, gathers); ``"neighbour"``; ``"all-to-all"``.
      room: Bytes that a compiled program shows for each that is sent: more than 1 where rows are
        data and it has room for more.
    """

    what: str
    axis: str
    sent_bytes: float
    hidden: bool
    times: float
    pattern: Literal["ring", "neighbour", "all-to-all"] = "ring"
    room: float = 1.0

    @property
    def room_bytes(self) -> float:
        """As the compiled program shows it."""
        return self.room * self.sent_bytes


def all_gathered(size: int, payload: float) -> float:
    """Sent by each of ``size`` chips that gather shards of ``payload`` bytes."""
    return (size - 1) * payload


def all_reduced(size: int, payload: float) -> float:
    """Sent by each of ``size`` chips that add up arrays of ``payload`` bytes."""
    return 2 * (size - 1) / size * payload
