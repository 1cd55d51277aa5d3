"""Stale synchronous parallel: nobody runs more than s clocks ahead of the slowest."""

import dataclasses
import math
from collections.abc import Sequence

from jdml.communicate.pace.messages import Arrival
from jdml.communicate.pace.rules.base import Book, Pace


@dataclasses.dataclass(frozen=True)
class StaleSynchronous(Pace):
    """See :func:`stale_synchronous`."""

    staleness: float

    def may_read(self, book: Book, worker: int, clock: int, max_staleness: float) -> bool:
        return clock - book.members.min_clock <= min(self.staleness, max_staleness)

    def turn(self, book: Book) -> int:
        return book.members.min_clock

    def hold(self, book: Book, arrival: Arrival) -> bool:
        book.held.setdefault(arrival.clock, []).append(arrival)
        return True

    def due(self, book: Book) -> Sequence[Arrival]:
        if not book.held:
            return ()
        clock = min(book.held)
        if clock > book.members.min_clock + self.staleness - 1:
            return ()
        return sorted(book.held.pop(clock), key=lambda arrival: arrival.worker)


def stale_synchronous(staleness: float) -> StaleSynchronous:
    """SSP(s): a worker at clock c reads once ``c - min_clock <= s``.

    It then sees every update of a clock up to ``c - s - 1``, its own, and of the others' those that
    have come, up to clock ``c + s - 1``: one of clock ``min_clock + s``, whose worker is as far
    ahead as it may be, is held until the slowest has moved. Updates of one clock that are released
    together change the parameters together, in the order of the workers' numbers. So with s = 0
    this is the synchronous pace, where all updates of a clock make one new version whatever their
    order of arrival.

    Args:
      staleness: s >= 0, in clocks (pushes of one worker); ``inf`` is :func:`asynchronous`.

    Raises:
      ValueError: s is negative or no whole number.

    Held at the server: at most one update per worker.

    Reference: Ho et al., "More Effective Distributed ML via a Stale Synchronous Parallel Parameter
    Server", 2013, section 3.
    """
    whole = isinstance(staleness, int | float) and not isinstance(staleness, bool)
    whole = whole and (staleness == math.inf or float(staleness).is_integer())
    if not (whole and staleness >= 0):
        raise ValueError(
            f"stale_synchronous({staleness!r}): expected a whole number of clocks >= 0, or inf. 0 "
            "is synchronous; a worker cannot be less stale than that."
        )
    return StaleSynchronous(staleness)


def synchronous() -> StaleSynchronous:
    """Every worker's update of clock c is in before anyone reads for clock c + 1: SSP with s = 0.

    Reference: Valiant, "A bridging model for parallel computation", 1990 (BSP).
    """
    return StaleSynchronous(0)


def asynchronous() -> StaleSynchronous:
    """Nobody waits: every update changes the parameters when it comes.

    Reference: Dean et al., "Large Scale Distributed Deep Networks", 2012 (Downpour SGD).
    """
    return StaleSynchronous(math.inf)
