"""Who takes part in a run: registration, leases, eviction and barriers, under the server's lock."""

import math
import threading
from collections.abc import Callable

from jdml.communicate.pace.barrier import Barriers
from jdml.communicate.pace.errors import Closed, StaleTimeout
from jdml.communicate.pace.members import Member
from jdml.communicate.pace.messages import MemberInfo, Registration
from jdml.communicate.pace.model import Model
from jdml.communicate.pace.rules.base import Book
from jdml.communicate.pace.waiting import Waiting


class Attendance:
    """The part of a :class:`Server` that sees members and no parameters.

    All methods may be called from any thread; :meth:`barrier` waits.
    """

    def __init__(
        self, model: Model, num_workers: int, lease: float, now: Callable[[], float]
    ) -> None:
        self.num_workers, self.now = num_workers, now
        self._model, self._lease = model, lease
        self._barriers = Barriers()
        self._num_registered = 0
        self._closed = ""
        # Calls that happen all the time take the lock itself, which is quicker.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._waiting = Waiting(self._changed, self)
        self.progress = 0
        """Grows whenever a pull that had to wait might be answered."""

    def register(self, worker: int, incarnation: int = 0) -> Registration:
        """Takes a worker in, or a newer incarnation of one, which fences the older.

        Args:
          worker: Its number, an int >= 0; updates of one version are added in this order.
          incarnation: Which of its lives, growing.

        Raises:
          ValueError: that incarnation is a member already, or the number is none.
          Evicted: a newer incarnation is known.
        """
        for name, value in (("worker", worker), ("incarnation", incarnation)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"register({name}={value!r}): expected an int >= 0.")
        self._model.rule.apply.check_worker(worker, self.num_workers)
        with self._changed:
            self._check_open()
            new = worker not in self._book.counted
            member = self._book.members.register(worker, incarnation, self.now())
            self._num_registered += new
            self._book.counted[worker] = self._book.version
            self._settle()
            return Registration(member.clock, self._book.version)

    def resume(self, worker: int) -> tuple[int, int] | None:
        """``(incarnation, clock)`` of a member whose next run goes on where its last one ended.

        ``None`` for one that must register: it is no member, or a push of its is missing.
        """
        with self._changed:
            self._check_open()
            if not self._book.members.is_live(worker):
                return None
            member = self._find(worker, None)
            return None if member.ahead else (member.incarnation, member.clock)

    def skip_to(self, worker: int, incarnation: int, clock: int) -> None:
        """Says that a worker's next push has that number, and that none of an earlier one comes.

        For one that has pushed nothing since it registered, where another server knows more of it.

        Raises:
          Evicted: it is no member.
        """
        with self._changed:
            self._book.members.skip_to(self._find(worker, incarnation), clock)
            self._settle()

    def heartbeat(self, worker: int, incarnation: int) -> None:
        """Says that a worker is alive; pull and push do so, too.

        Raises:
          Evicted: it is no member.
        """
        with self._changed:
            self._find(worker, incarnation)

    def members(self) -> dict[int, MemberInfo]:
        """The live members, by number."""
        with self._changed:
            self.expire()
            now = self.now()
            return {
                worker: MemberInfo(m.incarnation, m.clock, 0.0 if m.waiting else now - m.last_seen)
                for worker, m in sorted(self._book.members.live())
            }

    def evict(self, worker: int, why: str = "evicted") -> None:
        """Takes a worker out: nobody waits for it any more, and its own calls raise `Evicted`."""
        with self._changed:
            if self._book.members.evict(worker, why):
                self._settle()

    def expire(self) -> list[int]:
        """Evicts the members whose lease is over; who they were."""
        if self._lease == math.inf:
            return []
        with self._changed:
            now = self.now()
            late = [
                worker
                for worker, m in self._book.members.live()
                if not m.waiting and now - m.last_seen > self._lease
            ]
            for worker in late:
                self.evict(worker, f"silent for longer than the lease of {self._lease:g}")
            return late

    def close(self, why: str = "the run is over") -> None:
        """Ends it: whoever waits, or calls from now on, gets `Closed`."""
        with self._changed:
            self._closed = why
            self.progress += 1
            self._changed.notify_all()

    @property
    def lease(self) -> float:
        """How long a member may say nothing."""
        return self._lease

    def last_incarnation(self, worker: int) -> int:
        """The newest life of a worker that the server knows of, be it over; -1: none."""
        with self._changed:
            return self._book.members.last_incarnation(worker)

    @property
    def min_clock(self) -> int:
        """The least clock of the live members."""
        return self._book.members.min_clock

    def clock(self, worker: int) -> int:
        """A member's clock: its pushes that have come without a gap.

        Raises:
          Evicted: it is no member.
        """
        with self._changed:
            return self._book.members.find(worker).clock

    def barrier(self, name: str, worker: int, timeout: float | None = None) -> None:
        """Waits until every live member has come to the barrier of that name.

        Raises:
          StaleTimeout: they did not within ``timeout`` wall seconds; they are named.
          Evicted, Closed: as :meth:`Server.pull`.
        """
        with self._changed:
            self._find(worker, None)
            generation = self._barriers.arrive(name, worker)
            self._settle()

            def over() -> bool:
                done = self._barriers.is_over(name, generation)
                if not done:
                    self._find(worker, None)
                return done

            if not self._waiting.until(worker, over, timeout):
                missing = self._barriers.missing(name, self._book.members)
                self._barriers.leave(name, worker)
                raise StaleTimeout(
                    f"barrier {name!r}: worker {worker} waited {timeout:g} s for workers {missing}."
                )

    # Inside, where the lock is held.

    def find_member(self, worker: int) -> Member:
        """A live member's record."""
        return self._book.members.find(worker)

    @property
    def _book(self) -> Book:
        return self._model.book

    def _find(self, worker: int, incarnation: int | None) -> Member:
        self._check_open()
        member = self._model.book.members.find(worker, incarnation)
        member.last_seen = self.now()
        return member

    def _check_open(self) -> None:
        if self._closed:
            raise Closed(f"the server is closed: {self._closed}")

    def _settle(self) -> None:
        """After members came or went."""
        self._model.release()
        if self._num_registered >= self.num_workers:
            self._barriers.open_due(self._book.members)
        self._announce()

    def _announce(self) -> None:
        self.progress += 1
        self._changed.notify_all()
