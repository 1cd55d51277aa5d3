"""The contract of a rule: who may read when (a pace), and what an update does (an apply).

Both are frozen dataclasses without state of their own: what they look at is the server's
:class:`Book`, what an apply remembers (a momentum, the workers' last models) is handed to it and
back. So any pace goes with any apply, and a server is saved by saving its book.
"""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from jdml.communicate.pace.members import Members
from jdml.communicate.pace.messages import Arrival
from jdml.communicate.pace.payload import Format, Leaves, empty_like


@dataclasses.dataclass
class Book:
    """What the server knows besides the parameters.

    Attributes:
      num_workers: How many workers the run starts with.
      format: The parameters' tree.
      members: Who takes part, with their clocks.
      version: How many times the parameters have been changed.
      held: Updates that are in but whose turn has not come, by a slot that the pace chooses.
      counted: By worker, the version that its last update helped to make.
      room: Gives arrays like those it is shown, of any content: where the next version may be
        written. In a process that others read from, they lie in shared memory.
    """

    num_workers: int
    format: Format
    members: Members
    version: int = 0
    held: dict[int, list[Arrival]] = dataclasses.field(default_factory=dict)
    counted: dict[int, int] = dataclasses.field(default_factory=dict)
    room: Callable[[Leaves], Leaves] = empty_like


class Pace(abc.ABC):
    """Who waits for whom."""

    def check(self, num_workers: int) -> None:  # noqa: B027
        """Raises ``ValueError`` where this pace cannot serve so many workers."""

    @abc.abstractmethod
    def may_read(self, book: Book, worker: int, clock: int, max_staleness: float) -> bool:
        """Whether a worker at that clock may have the parameters as they are."""

    def turn(self, book: Book) -> int:
        """While this stays the same, nobody who had to wait may read."""
        return book.version

    @abc.abstractmethod
    def hold(self, book: Book, arrival: Arrival) -> bool:
        """Puts an update among the held ones; ``False`` refuses it."""

    @abc.abstractmethod
    def due(self, book: Book) -> Sequence[Arrival]:
        """Takes out the updates that change the parameters next, together; none: not yet."""


class Apply(abc.ABC):
    """What updates do to the parameters."""

    needs_base: ClassVar[bool] = False
    """Whether the parameters on which an update was computed are needed: one copy per worker."""

    def check(self, num_workers: int) -> None:  # noqa: B027
        """Raises ``ValueError`` where it cannot serve so many workers."""

    def check_worker(self, worker: int, num_workers: int) -> None:  # noqa: B027
        """Raises ``ValueError`` where that worker has no place in it."""

    def init(self, leaves: Leaves, book: Book) -> Any:
        """The state that it starts with: a pytree of arrays and numbers."""
        return ()

    def resized(self, state: Any, leaves: Leaves, num_workers: int) -> Any:
        """The state for a server that goes on with another number of workers."""
        return state

    @abc.abstractmethod
    def __call__(
        self, leaves: Leaves, state: Any, batch: Sequence[Arrival], book: Book
    ) -> tuple[Leaves, Any]:
        """New parameters and state; what it was given stays as it was."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """A pace and an apply."""

    pace: Pace
    apply: Apply

    def __post_init__(self) -> None:
        if not isinstance(self.pace, Pace) or not isinstance(self.apply, Apply):
            raise ValueError(
                f"Rule({self.pace!r}, {self.apply!r}): expected a pace such as "
                "stale_synchronous(3) and an apply such as average()."
            )

    def check(self, num_workers: int) -> None:
        """Raises ``ValueError`` where it cannot serve so many workers."""
        self.pace.check(num_workers)
        self.apply.check(num_workers)
