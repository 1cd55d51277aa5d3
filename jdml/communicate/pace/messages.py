"""What server and workers say to each other."""

import dataclasses
from typing import Any, NamedTuple

from jdml.communicate.pace.payload import Format, Leaves, Parcel

PyTree = Any


class Registration(NamedTuple):
    """Answer to ``register``: the ``seq`` that the worker's next push must carry, and the version.

    A worker's clock is the number of its pushes that are in, without a gap: the next one's number.
    """

    clock: int
    version: int


class Ack(NamedTuple):
    """Answer to ``push``.

    Attributes:
      version: The server's version after it.
      accepted: Whether the update is in, or held until its turn; ``False`` if it came too late.
      duplicate: Whether this ``seq`` had come before; then nothing was done.
    """

    version: int
    accepted: bool
    duplicate: bool = False


@dataclasses.dataclass(eq=False, slots=True)
class Snapshot:
    """The parameters at one moment; nothing changes it.

    Attributes:
      version: How many times parameters had been changed.
      min_clock: Every live worker's updates of a clock below it are in.
      parcel: The parameters, as they travel.
    """

    version: int
    min_clock: int
    parcel: Parcel
    format: Format
    _leaves: Leaves | None = None

    @property
    def leaves(self) -> Leaves:
        """The parameters' leaves as the worker reads them: read-only arrays."""
        if self._leaves is None:
            self._leaves = self.format.decode(self.parcel)
        return self._leaves

    @property
    def params(self) -> PyTree:
        """The parameters as the worker reads them: a pytree of read-only arrays."""
        return self.format.tree(self.leaves)


class Arrival(NamedTuple):
    """A push, as a rule sees it.

    Attributes:
      worker: Who.
      clock: Which of its updates, from 0.
      leaves: The update, decoded.
      base_version: The version on which it was computed.
      staleness: ``clock`` less the ``min_clock`` of that version: how many clocks of the slowest
        worker it could not see.
      base: The parameters of that version, where the rule asks for them (``needs_base``).
    """

    worker: int
    clock: int
    leaves: Leaves
    base_version: int
    staleness: int
    base: Leaves | None


class MemberInfo(NamedTuple):
    """A live member: which of its lives, its clock, and for how long it has said nothing.

    The silence is in units of the server's ``now``: wall seconds, or virtual ones.
    """

    incarnation: int
    clock: int
    silent: float


class Applied(NamedTuple):
    """One update that went into the parameters.

    Attributes:
      worker: Whose.
      clock: Which of its updates.
      version: Version that it helped to make.
      delay: How often the parameters had changed since the worker read them.
      staleness: As in :class:`Arrival`.
    """

    worker: int
    clock: int
    version: int
    delay: int
    staleness: int


class Traffic(NamedTuple):
    """Payload bytes at the server, counted on the arrays that came and went.

    Refused and repeated pushes travelled as well, and count.
    """

    pushes: int = 0
    pushed_bytes: int = 0
    pulls: int = 0
    pulled_bytes: int = 0
