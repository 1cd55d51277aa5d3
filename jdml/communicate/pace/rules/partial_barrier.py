"""Partial barrier: a round ends when S workers have reported, and nobody is older than τ rounds."""

import dataclasses
from collections.abc import Sequence

from jdml.communicate.pace.messages import Arrival
from jdml.communicate.pace.rules.base import Book, Pace


@dataclasses.dataclass(frozen=True)
class PartialBarrier(Pace):
    """See :func:`partial_barrier`."""

    num_reports: int
    max_age: int

    def check(self, num_workers: int) -> None:
        if self.num_reports > num_workers:
            raise ValueError(
                f"partial_barrier(S={self.num_reports}): there are only {num_workers} workers; S "
                "is how many of them a round waits for."
            )

    # Held by worker: a later report takes the place of an earlier one.

    def may_read(self, book: Book, worker: int, clock: int, max_staleness: float) -> bool:
        return worker not in book.held

    def hold(self, book: Book, arrival: Arrival) -> bool:
        book.held[arrival.worker] = [arrival]
        return True

    def due(self, book: Book) -> Sequence[Arrival]:
        held = book.held
        if not held or len(held) < min(self.num_reports, book.members.num_live):
            return ()
        for worker, _ in book.members.live():
            age = book.version - book.counted.get(worker, 0) + 1
            if age >= self.max_age and worker not in held:
                return ()
        batch = [arrival for _, (arrival,) in sorted(held.items())]
        held.clear()
        return batch


def partial_barrier(num_reports: int, max_age: int) -> PartialBarrier:
    """The parameters change once S of N workers have reported and every report is recent enough.

    A report's age is 1 in the round that it enters and grows by 1 in each that its worker misses;
    a round in which it would pass τ waits for that worker. Whoever has reported waits for the end
    of the round. S = N, or τ = 1, is synchronous.

    Args:
      num_reports: S, in ``1 <= S <= N``.
      max_age: τ >= 1, in rounds.

    Raises:
      ValueError: an argument is no positive int; at the server: S > N.

    Held at the server: at most one update per worker.

    Reference: Zhang & Kwok, "Asynchronous Distributed ADMM for Consensus Optimization", 2014,
    section 3 (partial barrier and bounded delay).
    """
    for name, value in (("S", num_reports), ("τ", max_age)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"partial_barrier: {name}={value!r}; expected an int >= 1.")
    return PartialBarrier(num_reports, max_age)
