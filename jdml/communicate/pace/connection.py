"""A worker's end of the line: its incarnation, the number of its next push, its encoder."""

from typing import Any

from jdml.communicate.pace.messages import Ack, Registration
from jdml.communicate.pace.payload import Parcel
from jdml.communicate.pace.sharded import AnyServer

PyTree = Any


class Connection:
    """One incarnation of a worker at a server; every backend's workers speak through one.

    Args:
      server: A :class:`Server` or :class:`ShardedServer`.
      worker: Number of the worker.
      incarnation: Which of its lives.

    Raises:
      ValueError, Evicted: as ``Server.register``.
    """

    def __init__(self, server: AnyServer, worker: int, incarnation: int = 0) -> None:
        registration: Registration = server.register(worker, incarnation)
        self.server, self.worker, self.incarnation = server, worker, incarnation
        self.clock = registration.clock
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
