"""What is going to happen, and when."""

import heapq
import math
from collections.abc import Callable
from typing import Any

from jdml.communicate.pace.virtual.clock import VirtualClock, VirtualSeconds


class Agenda:
    """Events by their time; those of one moment in the order in which they were entered."""

    def __init__(self, clock: VirtualClock) -> None:
        self.clock = clock
        self._heap: list[tuple[float, int, Callable[..., Any], tuple[Any, ...]]] = []
        self._entered = 0

    def __len__(self) -> int:
        return len(self._heap)

    def at(self, when: float, happen: Callable[..., Any], *what: Any) -> None:
        """Enters ``happen(*what)``; never, if that is when it happens."""
        if when < math.inf:
            heapq.heappush(self._heap, (when, self._entered, happen, what))
            self._entered += 1

    @property
    def next_time(self) -> float:
        """When the next thing happens."""
        return self._heap[0][0]

    def only(self, happen: Callable[..., Any]) -> bool:
        """Whether that is all that will happen."""
        return len(self._heap) == 1 and self._heap[0][2] == happen

    def happen(self) -> None:
        """Moves the clock to the next event, which happens."""
        when, _, happen, what = heapq.heappop(self._heap)
        self.clock.virtual_seconds = VirtualSeconds(when)
        happen(*what)
