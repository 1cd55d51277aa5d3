"""The workers' processes, as the run's own process sees them: who started, who failed, and why."""

import math
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from jdml.communicate.pace.drive import Tally
from jdml.communicate.pace.ray_backend.hand import Hand, Orders, Report
from jdml.communicate.pace.ray_backend.server import START_SECONDS
from jdml.communicate.pace.ray_backend.session import import_ray

ASK_EVERY = 0.25
"""Wall seconds between two questions what a worker has done."""


class Failed(Exception):
    """A worker's process has ended, or does not answer; ``cause`` is what its worker raised."""

    def __init__(self, why: str, cause: BaseException | None = None) -> None:
        super().__init__(why)
        self.cause = cause


class Post:
    """One worker's place in a run, through all its processes. Nothing in here waits.

    Args:
      number: Which worker.
      server: Where it takes part.
      orders: What every worker is told.
      state: What the first process goes on from.
      options: Of Ray, for its processes.
      frozen_after: Wall seconds after which one that does not answer counts as frozen.
      started: Called with each new process's number.
    """

    def __init__(
        self,
        number: int,
        server: Any,
        orders: Orders,
        state: dict[str, Any] | None,
        options: Mapping[str, Any],
        frozen_after: float,
        started: Callable[[int, int], None],
    ) -> None:
        self._ray = import_ray()
        self.number, self._server, self._orders = number, server, orders
        self._options, self._frozen_after, self._started = options, frozen_after, started
        self.state: dict[str, Any] | None = None
        """Of the worker that has ended its run."""
        self.ended = False
        self.num_steps = 0
        self._earlier = Tally()
        self._returned = 0
        self._report: Report | None = None
        self._running: Any = None
        self._question: Any = None
        self._asked = math.inf
        self._next_question = 0.0
        self._actor: Any = None
        self._begin(state)

    def _begin(self, state: dict[str, Any] | None) -> None:
        made = self._ray.remote(Hand).options(**self._options)
        self._actor = made.remote(self.number, self._server, self._orders, state, self.num_steps)
        self._report, self._question, self._running = None, None, None

    def prepare(self) -> Any:
        """A reference to the report of a process that is ready."""
        return self._actor.prepare.remote()

    def run(self) -> None:
        """Lets it work."""
        self._running = self._actor.run.remote()

    def begin_anew(self) -> None:
        """Another process in its place; the old one is killed."""
        self.end()
        self._begin(None)
        self.run()

    def end(self) -> None:
        """Kills its process and keeps what it last reported."""
        self._keep()
        self._ray.kill(self._actor)

    def stop(self) -> None:
        self._actor.stop.remote()

    @property
    def awaited(self) -> list[Any]:
        """References on which to wait."""
        return [r for r in (self._running, self._question) if r is not None]

    def look(self) -> None:
        """Takes what has come, and asks again when it is time.

        Raises:
          Failed: its process has.
        """
        if self.ended or self._running is None:
            return
        if self._question is not None and self._is_there(self._question):
            question, self._question = self._question, None
            self.take(self.got(question))
        elif self._question is not None and time.monotonic() - self._asked > self._patience:
            raise Failed(f"its process has not answered for {self._patience:g} s (frozen?)")
        if self._is_there(self._running):
            try:
                report, self.state = self.got(self._running)
            except Failed as failed:
                if failed.cause is not None:  # the process is there, and knows how far it came
                    self.take(self.got(self._actor.report.remote()))
                raise
            self.take(report)
            self.ended, self._running, self._question = True, None, None
        elif self._question is None and time.monotonic() >= self._next_question:
            self._asked = time.monotonic()
            self._next_question = self._asked + ASK_EVERY
            self._question = self._actor.report.remote()

    def take(self, report: Report) -> None:
        """Notes what a process has done so far."""
        if self._report is None or self._report.pid != report.pid:
            self._started(self.number, report.pid)
        self._report, self.num_steps = report, report.num_steps

    @property
    def tally(self) -> Tally:
        """Of all its processes."""
        if self._report is None:
            return self._earlier
        one, other = vars(self._earlier), vars(self._report.tally)
        return Tally(**{name: one[name] + other[name] for name in one})

    @property
    def returns(self) -> int:
        return self._returned + (0 if self._report is None else self._report.returns)

    @property
    def _patience(self) -> float:
        return self._frozen_after if self._report else max(self._frozen_after, START_SECONDS)

    def _keep(self) -> None:
        self._earlier, self._returned = self.tally, self.returns
        self._report = None

    def _is_there(self, ref: Any) -> bool:
        return bool(self._ray.wait([ref], timeout=0)[0])

    def got(self, ref: Any) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(ref, timeout=START_SECONDS)
        except errors.RayTaskError as error:
            cause = error.cause
            raise Failed(f"{type(cause).__name__}: {cause}", cause) from None
        except errors.RayError as error:
            raise Failed(_why(error)) from None


def _why(error: BaseException) -> str:
    """Ray's words, without its table of identifiers and a worker's traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    table = re.compile(r"(class_name|actor_id|pid|name|namespace|ip|repr): ")
    said = [line for line in lines if not table.match(line)]
    if "creation task" in str(error):  # what its constructor raised stands last
        return said[-1]
    return f"its process ended: {' '.join(said[:3])}"[:500]
