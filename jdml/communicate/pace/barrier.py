"""Named barriers over the live members."""

import dataclasses

from jdml.communicate.pace.members import Members


@dataclasses.dataclass
class _Barrier:
    generation: int = 0
    arrived: set[int] = dataclasses.field(default_factory=set)


class Barriers:
    """Who has come to which barrier. Without locks or waiting, which are the server's."""

    def __init__(self) -> None:
        self._named: dict[str, _Barrier] = {}

    def arrive(self, name: str, worker: int) -> int:
        """Notes a worker; the generation for whose end it waits."""
        barrier = self._named.setdefault(name, _Barrier())
        barrier.arrived.add(worker)
        return barrier.generation

    def is_over(self, name: str, generation: int) -> bool:
        return self._named[name].generation != generation

    def missing(self, name: str, members: Members) -> list[int]:
        arrived = self._named[name].arrived
        return [worker for worker, _ in members.live() if worker not in arrived]

    def leave(self, name: str, worker: int) -> None:
        """A worker that no longer waits (its time was up)."""
        self._named[name].arrived.discard(worker)

    def open_due(self, members: Members) -> bool:
        """Ends every barrier that all live members have reached; whether there was one."""
        opened = False
        for barrier in self._named.values():
            barrier.arrived = {w for w in barrier.arrived if members.is_live(w)}
            if barrier.arrived and len(barrier.arrived) == members.num_live:
                barrier.generation += 1
                barrier.arrived = set()
                opened = True
        return opened
