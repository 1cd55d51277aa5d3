"""When a worker fails: who is evicted, who returns, and what ends the run."""

import threading
from collections import Counter
from typing import Literal, get_args

from jdml.communicate.pace.connection import Connection, renew
from jdml.communicate.pace.errors import Closed, Evicted, PaceError, StaleTimeout
from jdml.communicate.pace.sharded import AnyServer
from jdml.communicate.pace.workers.base import Worker

OnFailure = Literal["end", "evict", "restart"]
"""What follows a worker's failure: the run's end, a run without it, or its next incarnation."""


class Supervisor:
    """Decides on failures, as they happen and from any thread.

    A failed worker is evicted at once, so that nobody waits for it. One that the server evicted
    while it lived (its lease was over) returns as a newer incarnation, whatever the policy; one
    whose number a newer incarnation has taken does not.

    Args:
      server: Where the workers are members.
      on_failure: What follows when a worker raises.
      max_restarts: How often each worker may be started anew after a failure; once more ends the
        run.

    Attributes:
      restarts: By worker, how often it was started anew after a failure.
      returns: By worker, how often it returned after an eviction.
      gone: Why workers stay away, by number.

    Raises:
      ValueError: another policy, or a negative number.
    """

    def __init__(
        self, server: AnyServer, on_failure: OnFailure = "end", max_restarts: int = 3
    ) -> None:
        if on_failure not in get_args(OnFailure) or max_restarts < 0:
            raise ValueError(
                f"on_failure={on_failure!r}, max_restarts={max_restarts!r}: expected one of "
                f"{get_args(OnFailure)}, and a number >= 0."
            )
        self.server, self.on_failure, self.max_restarts = server, on_failure, max_restarts
        self.restarts: Counter[int] = Counter()
        self.returns: Counter[int] = Counter()
        self.gone: dict[int, str] = {}
        self._lock = threading.Lock()

    def settle(self, worker: Worker, line: Connection, error: BaseException) -> Connection | None:
        """The line of the worker's next incarnation; ``None`` if there is none.

        Args:
          worker: Whose incarnation has ended.
          line: That incarnation's line.
          error: What ended it.

        Raises:
          PaceError: the run must end; the message names the worker and says why.
        """
        if isinstance(error, Closed | StaleTimeout):
            raise error
        number = worker.number
        if isinstance(error, Evicted):
            with self._lock:
                if self.server.last_incarnation(number) > line.incarnation:
                    self._stays_away(number, str(error))
                    return None
                self.returns[number] += 1
                return renew(line, worker)
        why = (
            f"worker {number} (incarnation {line.incarnation}) failed after {worker.num_steps} "
            f"local steps: {type(error).__name__}: {error}"
        )
        with self._lock:
            self.server.evict(number, why)
            if self.on_failure == "end":
                raise PaceError(f"{why}. on_failure='evict' goes on without it.") from error
            if self.on_failure == "evict":
                self._stays_away(number, why)
                return None
            if self.restarts[number] >= self.max_restarts:
                raise PaceError(
                    f"{why}. It was started anew {self.max_restarts} times before (max_restarts)."
                ) from error
            self.restarts[number] += 1
            return renew(line, worker)

    def _stays_away(self, number: int, why: str) -> None:
        self.gone[number] = why
        if len(self.gone) == self.server.num_workers:
            raise PaceError(f"no worker is left: {'; '.join(self.gone.values())}.")
