"""A worker's end of the line: its incarnation, the number of its next push, its encoder.

A run :func:`attach`-es its workers when it begins: new ones register, those that an earlier run
left as members go on as they are. One that died, or was evicted, is :func:`renew`-ed. When a run
ends, :func:`detach` leaves with the worker what error feedback owes.
"""

from collections.abc import Sequence
from typing import Any

from jdml.communicate.pace.messages import Ack, Registration
from jdml.communicate.pace.payload import Parcel
from jdml.communicate.pace.sharded import AnyServer
from jdml.communicate.pace.workers.base import Worker

PyTree = Any


class Connection:
    """One incarnation of a worker at a server; every backend's workers speak through one.

    Args:
      server: A :class:`Server` or :class:`ShardedServer`.
      worker: Number of the worker.
      incarnation: Which of its lives.
      clock: Number of its next push, if it is a member; ``None`` registers it.

    Raises:
      ValueError, Evicted: as ``Server.register``.
    """

    def __init__(
        self, server: AnyServer, worker: int, incarnation: int = 0, clock: int | None = None
    ) -> None:
        if clock is None:
            registration: Registration = server.register(worker, incarnation)
            clock = registration.clock
        self.server, self.worker, self.incarnation = server, worker, incarnation
        self.clock = clock
        """Number of the next push."""
        self.sender = server.sender(worker)

    def encode(self, update: PyTree) -> tuple[int, Parcel]:
        """``(seq, parcel)`` of the next push, which then counts as sent."""
        seq, self.clock = self.clock, self.clock + 1
        return seq, self.sender(update, seq)

    def push(self, seq: int, parcel: Parcel, base_version: Any) -> Ack:
        """Brings it to the server; again, if that is not known to have happened."""
        return self.server.push(self.worker, self.incarnation, seq, parcel, base_version)

    def try_pull(self, max_staleness: float | None = None) -> Any:
        """``Server.try_pull`` at the clock of what was sent, be it still on its way."""
        return self.server.try_pull(
            self.worker, max_staleness, incarnation=self.incarnation, clock=self.clock
        )

    def pull(self, max_staleness: float | None = None, timeout: float | None = None) -> Any:
        """``Server.pull`` at the clock of what was sent, be it still on its way."""
        return self.server.pull(
            self.worker, max_staleness, timeout, incarnation=self.incarnation, clock=self.clock
        )


def attach(server: AnyServer, workers: Sequence[Worker]) -> list[Connection]:
    """The lines of workers that begin, or go on where the run before this one left them.

    Nobody else may speak for these workers: two runs at a time must not share one.

    Raises:
      ValueError: not as many as the server starts with, or two of one number.
    """
    numbers = [worker.number for worker in workers]
    if len(numbers) != server.num_workers:
        raise ValueError(
            f"{len(numbers)} workers, but the server starts with {server.num_workers}."
        )
    twice = sorted({n for n in numbers if numbers.count(n) > 1})
    if twice:
        raise ValueError(f"workers {twice} are there more than once: each takes its own number.")
    return [_attached(server, worker) for worker in workers]


def _attached(server: AnyServer, worker: Worker) -> Connection:
    standing = server.resume(worker.number)
    if standing is None:
        worker.lose_unsent()
        line = Connection(server, worker.number, server.last_incarnation(worker.number) + 1)
    else:
        line = Connection(server, worker.number, *standing)
    line.sender.residual = worker.residual
    return line


def renew(line: Connection, worker: Worker) -> Connection:
    """The line of a worker's next incarnation; call its ``run()`` again.

    What it had computed and not sent is lost, and with it what error feedback owed.
    """
    known = line.server.last_incarnation(worker.number)
    worker.lose_unsent()
    return Connection(line.server, worker.number, max(known, line.incarnation) + 1)


def detach(line: Connection, worker: Worker) -> None:
    """Leaves with the worker what its end of the line keeps."""
    worker.residual = line.sender.residual
