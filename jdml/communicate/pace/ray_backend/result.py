"""What a run over processes says."""

import dataclasses
from typing import Any, Literal, NamedTuple

from jdml.communicate.pace.threads.wall import WallRun


class Happening(NamedTuple):
    """Something that befell a process of the run.

    Attributes:
      wall_seconds: Since its start.
      what: ``started``, ``failed`` (it died, raised, or does not answer), ``gone`` (for good), and
        of a server ``lost`` and ``restored``.
      who: ``worker 3`` or ``server shard 1``.
      why: In words.
      pid: Of the process that started.
    """

    wall_seconds: float
    what: Literal["started", "failed", "gone", "lost", "restored"]
    who: str
    why: str = ""
    pid: int | None = None


@dataclasses.dataclass(frozen=True)
class RayRun(WallRun):
    """What a run took; measured. Times and counts of a process that died are its last report's.

    Attributes:
      happenings: What befell its processes, in order.
      worker_states: Of ``Worker.state``, by number, of those that lived to the end; a later run
        goes on from them.
    """

    happenings: list[Happening]
    worker_states: dict[int, dict[str, Any]]
