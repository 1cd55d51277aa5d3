"""Backup workers: the first K updates of a round make the next version, the late are refused."""

import dataclasses
from collections.abc import Sequence

from jdml.communicate.pace.messages import Arrival
from jdml.communicate.pace.rules.base import Book, Pace


@dataclasses.dataclass(frozen=True)
class Backup(Pace):
    """See :func:`backup`."""

    num_backups: int

    def check(self, num_workers: int) -> None:
        if self.num_backups >= num_workers:
            raise ValueError(
                f"backup({self.num_backups}): there are {num_workers} workers, of which at most "
                f"{num_workers - 1} can be spared."
            )

    # Held by worker, at most one update of each.

    def may_read(self, book: Book, worker: int, clock: int, max_staleness: float) -> bool:
        # Only its own update of this round keeps it waiting.
        return worker not in book.held

    def hold(self, book: Book, arrival: Arrival) -> bool:
        if arrival.base_version != book.version or arrival.worker in book.held:
            return False
        book.held[arrival.worker] = [arrival]
        return True

    def due(self, book: Book) -> Sequence[Arrival]:
        held = book.held
        enough = min(book.num_workers - self.num_backups, book.members.num_live)
        if not held or len(held) < enough:
            return ()
        batch = [arrival for _, (arrival,) in sorted(held.items())]
        held.clear()
        return batch


def backup(num_backups: int) -> Backup:
    """Of N = K + b workers, the first K to push an update of this version make the next one.

    Those that come later are answered ``accepted=False`` and read the new version. With b = 0 this
    is synchronous. Where fewer than K workers are left, all of them are waited for.

    Args:
      num_backups: b, in ``0 <= b < N``.

    Raises:
      ValueError: b is no int >= 0; at the server: it is not below the number of workers.

    Held at the server: up to K updates.

    Reference: Chen et al., "Revisiting Distributed Synchronous SGD", 2016, section 3.
    """
    if not isinstance(num_backups, int) or isinstance(num_backups, bool) or num_backups < 0:
        raise ValueError(f"backup({num_backups!r}): expected an int >= 0.")
    return Backup(num_backups)
