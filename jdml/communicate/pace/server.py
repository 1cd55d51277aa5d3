"""The server: parameters that workers pull and push at their own pace.

One object for every backend. It never computes a gradient and never sleeps but in :meth:`pull` and
:meth:`barrier`; :meth:`try_pull` is for callers that may not wait (virtual time).
"""

import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from jdml.communicate.pace.attendance import Attendance
from jdml.communicate.pace.barrier import Barriers
from jdml.communicate.pace.errors import StaleTimeout
from jdml.communicate.pace.members import Pulled
from jdml.communicate.pace.messages import Ack, Applied, Arrival, Snapshot, Traffic
from jdml.communicate.pace.model import Model
from jdml.communicate.pace.payload import Format, Leaves, Parcel, Sender, empty_like, split_content
from jdml.communicate.pace.rules.base import Rule
from jdml.communicate.pace.waiting import who_is_awaited

PyTree = Any


class Server(Attendance):
    """Holds the parameters; a :class:`Rule` says who may read when, and what an update does.

    All methods may be called from any thread. Every pull returns what was complete at one moment;
    an update is applied together with the clock that it advances, and once, however often it comes.

    Args:
      params: Pytree of arrays: the initial parameters. Copied.
      rule: ``Rule(pace, apply)``, such as ``Rule(stale_synchronous(3), add(1 / 8))``.
      num_workers: How many workers the run starts with; nobody reads before so many registered.
      push: What updates are encoded with on their way in: ``None`` (as they are), a codec, or
        ``error_feedback(codec)``, whose residual each worker keeps (:meth:`sender`).
      pull: The same for parameters on their way out; without error feedback.
      lease: A member that says nothing for longer is evicted; in units of ``now``.
      now: The clock that leases are measured on.
      seed: Of the codecs that draw random numbers.
      on_applied: Called with an :class:`Applied` for every update that enters the parameters, in
        order, while the server is locked.
      room: Gives the arrays that new versions of large parameters are written to.

    Raises:
      ValueError: the rule cannot serve so many workers, a codec needs state that the server does
        not keep, or a leaf cannot be encoded.
    """

    def __init__(
        self,
        params: PyTree,
        rule: Rule,
        num_workers: int,
        *,
        push: Any = None,
        pull: Any = None,
        lease: float = math.inf,
        now: Callable[[], float] = time.monotonic,
        seed: int = 0,
        on_applied: Callable[[Applied], None] | None = None,
        room: Callable[[Leaves], Leaves] = empty_like,
    ) -> None:
        if not isinstance(num_workers, int) or isinstance(num_workers, bool) or num_workers < 1:
            raise ValueError(f"Server(num_workers={num_workers!r}): expected an int >= 1.")
        if not isinstance(rule, Rule):
            raise ValueError(
                f"Server(rule={rule!r}): expected Rule(pace, apply), such as "
                "Rule(asynchronous(), add())."
            )
        if not lease > 0:
            raise ValueError(f"Server(lease={lease!r}): expected a time > 0, or inf.")
        rule.check(num_workers)
        push_codec, self._feedback = split_content(push, "push")
        pull_codec, _ = split_content(pull, "pull")
        self.push_format = Format(params, push_codec)
        model = Model(
            params,
            rule,
            num_workers,
            self.push_format,
            Format(params, pull_codec),
            seed,
            on_applied,
            room,
        )
        super().__init__(model, num_workers, lease, now)
        self._pushes = self._pushed_bytes = self._pulls = self._pulled_bytes = 0
        self._seed = seed

    # Reading.

    @property
    def version(self) -> int:
        """How many times the parameters have been changed."""
        return self._book.version

    @property
    def traffic(self) -> Traffic:
        """Payload bytes and messages in each direction, as they were."""
        with self._changed:
            return Traffic(self._pushes, self._pushed_bytes, self._pulls, self._pulled_bytes)

    @property
    def params(self) -> PyTree:
        """The parameters as they are: a pytree of read-only arrays, not encoded."""
        with self._changed:
            return self.push_format.tree(self._model.leaves)

    @property
    def apply_state(self) -> Any:
        """What the rule's apply remembers."""
        return self._model.apply_state

    @property
    def staleness(self) -> Counter[int]:
        """How many applied updates were how many clocks stale (``Arrival.staleness``)."""
        return self._model.staleness

    def try_pull(
        self,
        worker: int,
        max_staleness: float | None = None,
        *,
        incarnation: int | None = None,
        clock: int | None = None,
    ) -> Snapshot | None:
        """:meth:`pull` for callers that cannot wait: ``None`` if the worker would have to."""
        with self._lock:
            member = self._find(worker, incarnation)
            model = self._model
            rule, book = model.rule, model.book
            if self._num_registered < self.num_workers:
                return None
            at = member.clock if clock is None else clock
            bound = math.inf if max_staleness is None else max_staleness
            if not rule.pace.may_read(book, worker, at, bound):
                return None
            snapshot = model.publish()
            base = snapshot.leaves if rule.apply.needs_base else None
            member.pulled[snapshot.version] = Pulled(snapshot.min_clock, base)
            self._pulls += 1
            self._pulled_bytes += snapshot.parcel.nbytes
            return snapshot

    def pull(
        self,
        worker: int,
        max_staleness: float | None = None,
        timeout: float | None = None,
        *,
        incarnation: int | None = None,
        clock: int | None = None,
    ) -> Snapshot:
        """The parameters, once the pace lets this worker read.

        Args:
          worker: Who reads.
          max_staleness: Waits until it is at most so many clocks ahead of the slowest; the pace's
            own bound holds as well.
          timeout: Wall seconds; ``None`` waits as long as it takes.
          incarnation: Which of the worker's lives; ``None``: the one that is a member.
          clock: The worker's own count of its pushes, where some are still on their way; ``None``:
            those that have come.

        Raises:
          StaleTimeout: the others did not come in time; they are named.
          Evicted: the worker is no member, or ceased to be one while it waited.
          Closed: the server was closed.
        """
        if max_staleness is not None and not max_staleness >= 0:
            raise ValueError(f"pull(max_staleness={max_staleness!r}): expected >= 0, or None.")
        snapshot: Snapshot | None = None

        def answered() -> bool:
            nonlocal snapshot
            snapshot = self.try_pull(worker, max_staleness, incarnation=incarnation, clock=clock)
            return snapshot is not None

        with self._changed:
            if not self._waiting.until(worker, answered, timeout):
                raise StaleTimeout(
                    f"worker {worker} waited {timeout:g} s: "
                    + who_is_awaited(
                        worker, self._book.members, self._num_registered, self.num_workers
                    )
                )
        assert snapshot is not None
        return snapshot

    def published(self) -> Snapshot:
        """The parameters as the next reader gets them, encoded once."""
        with self._changed:
            return self._model.publish()

    # Writing.

    def sender(self, worker: int) -> Sender:
        """What encodes that worker's updates, with the residual that is the worker's to keep."""
        return Sender(self.push_format, self._feedback, self._seed, worker)

    def push(
        self, worker: int, incarnation: int, seq: int, update: PyTree, base_version: int
    ) -> Ack:
        """Brings an update in; with the clock that it advances, at once or not at all.

        Args:
          worker: Who.
          incarnation: Which of its lives.
          seq: Number of this update: the clock that ``register`` gave, and one more each time. A
            number that has come before changes nothing and is answered as it was.
          update: What :meth:`sender` made of it, or (without a codec) the tree itself. It must not
            be changed afterwards.
          base_version: The version that it was computed on, which this worker pulled.

        Raises:
          ValueError: another tree than the parameters (the leaf is named), or a version that this
            worker did not pull.
          Evicted: no member, or an incarnation that was replaced; nothing was changed.
          Closed: the server was closed.
        """
        if not isinstance(update, Parcel):
            if self.push_format.codec is not None:
                raise ValueError(
                    f"push: updates are encoded with {self.push_format.codec}; push what "
                    "server.sender(worker)(update, seq) returns."
                )
            update = self.push_format.encode(self.push_format.leaves(update, "push"))
        leaves = self.push_format.decode(update)
        with self._lock:
            member = self._find(worker, incarnation)
            self._pushes += 1
            self._pushed_bytes += update.nbytes
            model = self._model
            book, pace = model.book, model.rule.pace
            if seq < 0:
                raise ValueError(f"push(seq={seq}): expected the clock that register gave, or on.")
            if member.has(seq):
                return Ack(book.version, seq not in member.refused, duplicate=True)
            pulled = member.pulled.get(base_version)
            if pulled is None:
                raise ValueError(
                    f"push: worker {worker} has no version {base_version} to base an update on; "
                    f"it pulled {sorted(member.pulled)} since."
                )
            arrival = Arrival(
                worker, seq, leaves, base_version, seq - pulled.min_clock, pulled.leaves
            )
            before = pace.turn(book)
            accepted = pace.hold(book, arrival)
            if not accepted:
                member.refused.add(seq)
            book.members.count(member, seq, base_version)
            model.release()
            if pace.turn(book) != before:
                self._announce()
            return Ack(book.version, accepted)

    # Saving.

    def snapshot(self) -> dict[str, Any]:
        """All that the server is, as plain data: containers, numbers and read-only arrays.

        Nothing is copied, and nothing that happens afterwards changes it.
        """
        with self._changed:
            return self._model.to_state() | {
                "num_registered": self._num_registered,
                "traffic": tuple(self.traffic),
            }

    def restore(self, state: dict[str, Any]) -> None:
        """Makes this server what another was at its :meth:`snapshot`, bit for bit.

        The same rule is taken for granted. Leases start anew, barriers are empty; whoever waits
        looks again. This server may start with another number of workers: then those that have
        never registered are waited for, and those that will not return are for the caller to evict.

        Raises:
          ValueError: another model (the leaf is named), another rule's state, or the state of a
            sharded server.
        """
        if not isinstance(state, dict):
            raise ValueError(f"restore: saved by {len(state)} servers, and this is one alone.")
        with self._changed:
            self._model.restore(state, self.now())
            self._num_registered = state["num_registered"]
            self._pushes, self._pushed_bytes, self._pulls, self._pulled_bytes = state["traffic"]
            self._barriers = Barriers()
            self._announce()
