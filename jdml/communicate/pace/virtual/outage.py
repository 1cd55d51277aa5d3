"""What may happen to a worker in virtual time."""

import dataclasses
import math
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Outage:
    """A worker is killed, or frozen, and perhaps comes back.

    A killed worker loses what it computes; what it sent still arrives. It comes back as a newer
    incarnation. A frozen one goes on where it was, as the incarnation that it was: if its lease is
    over by then, the server refuses it, and it registers anew.

    Args:
      worker: Its number.
      virtual_seconds: When, > 0.
      kind: ``"killed"`` or ``"frozen"``.
      back_after_virtual_seconds: For how long; ``inf`` for good.
    """

    worker: int
    virtual_seconds: float
    kind: Literal["killed", "frozen"] = "killed"
    back_after_virtual_seconds: float = math.inf

    def __post_init__(self) -> None:
        fits = self.virtual_seconds > 0 and self.back_after_virtual_seconds > 0
        if self.kind not in ("killed", "frozen") or not fits:
            raise ValueError(
                f"{self}: expected kind 'killed' or 'frozen', and times greater than 0."
            )
