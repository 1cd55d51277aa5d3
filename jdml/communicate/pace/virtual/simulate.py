"""Workers and server in virtual time: a discrete-event simulation.

The same server and the same workers as in any other backend; only waiting is replaced. What is
computed and what is sent is real, when it happens is drawn from a model of the clocks. Events of
one moment happen in the order in which they were scheduled, and every draw comes from the seed: a
run repeats itself bit for bit.
"""

import dataclasses
import heapq
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jdml.communicate.pace.arrivals import Arrivals
from jdml.communicate.pace.connection import Connection
from jdml.communicate.pace.errors import Evicted, PaceError
from jdml.communicate.pace.messages import Ack
from jdml.communicate.pace.payload import Parcel
from jdml.communicate.pace.sharded import AnyServer
from jdml.communicate.pace.virtual.clock import VirtualClock, VirtualSeconds
from jdml.communicate.pace.virtual.durations import Durations
from jdml.communicate.pace.virtual.network import Network, Traveller
from jdml.communicate.pace.virtual.outage import Outage
from jdml.communicate.pace.workers.base import Compute, Pull, Push, Run, Worker


class Event(NamedTuple):
    """One line of a trace."""

    virtual_seconds: VirtualSeconds
    worker: int
    what: str
    number: int


class Evaluation(NamedTuple):
    """A value of the run, at a moment of it."""

    virtual_seconds: VirtualSeconds
    version: int
    value: Any


@dataclasses.dataclass(frozen=True)
class VirtualRun:
    """What a simulation says.

    Attributes:
      virtual_seconds: Its length.
      num_events: Events that happened: computations, pushes that came, pulls that were answered.
      evaluations: What ``evaluate`` returned, in order.
      computing_virtual_seconds: Per worker, time spent on local steps.
      waiting_virtual_seconds: Per worker, time in which the server kept a pull waiting.
      refused: Pushes answered ``accepted=False``.
      trace: Every event, if asked for.
    """

    virtual_seconds: VirtualSeconds
    num_events: int
    evaluations: list[Evaluation]
    computing_virtual_seconds: np.ndarray
    waiting_virtual_seconds: np.ndarray
    refused: int
    trace: list[Event]


def simulate(
    server: AnyServer,
    workers: Sequence[Worker],
    clocks: Arrivals | np.ndarray,
    *,
    virtual_seconds: float = math.inf,
    num_versions: float = math.inf,
    num_events: float = math.inf,
    network: Network | None = None,
    outages: Sequence[Outage] = (),
    evaluate: Callable[[Any], Any] | None = None,
    evaluate_every_virtual_seconds: float = math.inf,
    seed: int = 0,
    trace: bool = False,
) -> VirtualRun:
    """Runs the workers against the server until the first of three limits.

    Args:
      server: A new one, whose ``now`` is a :class:`VirtualClock`.
      workers: As many as the server starts with.
      clocks: Virtual seconds of each local step: an :data:`Arrivals`, of which column k is the
        k-th worker's, or a recorded trace, floats ``[num_steps, num_workers]``.
      virtual_seconds: The run's length, at most.
      num_versions: Stops when the server's version has grown to this.
      num_events: Stops after so many, or a few more that happen in the same moment.
      network: How long messages travel; ``None``: no time at all.
      outages: Workers that are killed or frozen.
      evaluate: ``params -> value``, called at the start, at the end, and every
        ``evaluate_every_virtual_seconds``, before what happens in the same moment.
      evaluate_every_virtual_seconds: > 0.
      seed: Of clocks and network.
      trace: Whether to keep every event.

    Raises:
      ValueError: no limit, another number of workers, or a server whose time is not virtual.
      PaceError: nothing can happen any more; the message says who waits, and for whom.
    """
    return _Simulation(
        server, workers, Durations(clocks, len(workers), seed), network, outages, seed, trace
    ).run(virtual_seconds, num_versions, num_events, evaluate, evaluate_every_virtual_seconds)


class _Actor:
    """A worker in the simulation."""

    def __init__(self, index: int, worker: Worker) -> None:
        self.index, self.worker = index, worker
        self.run: Run
        self.line: Connection
        self.life = 0
        """Events of an earlier life do not happen."""
        self.steps = 0
        self.in_flight = False
        self.next_push: Push | None = None
        self.wanted: Pull | None = None
        self.waits_since = 0.0
        self.busy_since = self.busy_until = 0.0
        self.dead = False
        self.frozen_until: float | None = None


class _Simulation:
    def __init__(
        self,
        server: AnyServer,
        workers: Sequence[Worker],
        durations: Durations,
        network: Network | None,
        outages: Sequence[Outage],
        seed: int,
        trace: bool,
    ) -> None:
        if not isinstance(server.now, VirtualClock):
            raise ValueError(
                "simulate: the server measures leases in wall time; make it with "
                "Server(..., now=VirtualClock())."
            )
        if len(workers) != server.num_workers:
            raise ValueError(
                f"simulate: {len(workers)} workers, but the server starts with "
                f"{server.num_workers}."
            )
        self.server, self.clock, self.durations = server, server.now, durations
        self.actors = [_Actor(k, worker) for k, worker in enumerate(workers)]
        self.by_number = {a.worker.number: a for a in self.actors}
        self.network = None if network is None else Traveller(network, seed)
        self.outages = outages
        for outage in outages:
            if outage.worker not in self.by_number:
                raise ValueError(f"simulate: {outage} names no worker.")
        self.heap: list[tuple[float, int, Callable[..., Any], tuple[Any, ...]]] = []
        self.order = 0
        self.num_events = 0
        self.waiting: dict[int, _Actor] = {}
        self.seen = -1
        self.computing = np.zeros(len(workers))
        self.waited = np.zeros(len(workers))
        self.refused = 0
        self.keep_trace = trace
        self.trace: list[Event] = []

    # The loop.

    def run(
        self,
        virtual_seconds: float,
        num_versions: float,
        num_events: float,
        evaluate: Callable[[Any], Any] | None,
        every: float,
    ) -> VirtualRun:
        if min(virtual_seconds, num_versions, num_events) == math.inf:
            raise ValueError(
                "simulate: the run would have no end; give virtual_seconds, num_versions or "
                "num_events."
            )
        if not every > 0:
            raise ValueError(f"simulate(evaluate_every_virtual_seconds={every!r}): expected > 0.")
        server, clock, heap = self.server, self.clock, self.heap
        evaluations: list[Evaluation] = []

        def look() -> None:
            if evaluate is not None:
                evaluations.append(
                    Evaluation(clock.virtual_seconds, server.version, evaluate(server.params))
                )

        look()
        start = float(clock.virtual_seconds)
        for outage in self.outages:
            self.at(start + outage.virtual_seconds, self.strike, outage)
        if server.lease < math.inf:
            self.at(start + server.lease / 4, self.keep_leases)
        for actor in self.actors:
            actor.line = Connection(server, actor.worker.number)
            actor.run = actor.worker.run()
        for actor in self.actors:
            self.drive(actor, None)
        next_look, end = start + every, start + virtual_seconds
        while True:
            if self.waiting and self.seen != server.progress:
                self.answer_waiting()
            if server.version >= num_versions or self.num_events >= num_events:
                break
            if not self.anything_left():
                self.complain()
            now = heap[0][0]
            while next_look <= min(now, end):
                clock.virtual_seconds = VirtualSeconds(next_look)
                look()
                next_look += every
            if now > end:
                clock.virtual_seconds = VirtualSeconds(end)
                break
            _, _, happen, what = heapq.heappop(heap)
            clock.virtual_seconds = VirtualSeconds(now)
            happen(*what)
        look()
        for actor in self.actors:
            self.stop_counting(actor)
        for actor in self.waiting.values():
            self.waited[actor.index] += clock.virtual_seconds - actor.waits_since
        return VirtualRun(
            VirtualSeconds(clock.virtual_seconds - start),
            self.num_events,
            evaluations,
            self.computing,
            self.waited,
            self.refused,
            self.trace,
        )

    def at(self, when: float, happen: Callable[..., Any], *what: Any) -> None:
        if when < math.inf:
            heapq.heappush(self.heap, (when, self.order, happen, what))
            self.order += 1

    def anything_left(self) -> bool:
        """Leases alone change nothing once nobody is left whose lease could end."""
        if len(self.heap) > 1:
            return True
        if not self.heap:
            return False
        only_leases = self.heap[0][2] == self.keep_leases
        members = self.server.members()
        return not only_leases or any(a.dead and a.worker.number in members for a in self.actors)

    def complain(self) -> None:
        raise PaceError(
            f"at {self.clock.virtual_seconds:g} virtual seconds nothing can happen any more: "
            f"workers {sorted(a.worker.number for a in self.waiting.values())} wait; killed or "
            f"frozen for good: {sorted(a.worker.number for a in self.actors if a.dead)}. Members "
            f"and their clocks: { {w: m.clock for w, m in self.server.members().items()} }. A "
            "finite lease lets the server go on without the dead."
        )

    def note(self, actor: _Actor, what: str, number: int) -> None:
        if self.keep_trace:
            self.trace.append(Event(self.clock.virtual_seconds, actor.worker.number, what, number))

    # A worker's requests.

    def resume(self, actor: _Actor, life: int, answer: Any) -> None:
        """An answer has come, to a worker that may have died, or be frozen, meanwhile."""
        if life != actor.life:
            return
        if actor.frozen_until is not None:
            self.at(actor.frozen_until, self.resume, actor, life, answer)
            return
        self.stop_counting(actor)
        self.drive(actor, answer)

    def stop_counting(self, actor: _Actor) -> None:
        """Adds up what it has computed until now, if it did."""
        end = min(actor.busy_until, self.clock.virtual_seconds)
        self.computing[actor.index] += max(0.0, end - actor.busy_since)
        actor.busy_since = actor.busy_until = 0.0

    def drive(self, actor: _Actor, answer: Any) -> None:
        """Lets the worker go on until it has to wait for something."""
        now = self.clock.virtual_seconds
        try:
            while True:
                request = actor.run.send(answer)
                answer = None
                if isinstance(request, Compute):
                    count = request.num_steps
                    took = self.durations.total(actor.index, actor.steps, count)
                    actor.steps += count
                    self.num_events += 1
                    actor.busy_since, actor.busy_until = now, now + took
                    self.note(actor, "compute", count)
                    self.at(now + took, self.resume, actor, actor.life, None)
                    return
                if isinstance(request, Pull):
                    if self.network is not None:
                        there = self.network.arrival("up", now, 0)
                        self.at(there, self.pull_there, actor, actor.life, request)
                        return
                    answer = actor.line.try_pull(request.max_staleness)
                    if answer is None:
                        self.let_wait(actor, request)
                        return
                    self.num_events += 1
                    self.note(actor, "pull", answer.version)
                    continue
                if actor.in_flight:
                    actor.next_push = request
                    return
                ack = self.send(actor, request)
                if request.wait:
                    if self.network is not None:
                        return
                    answer = ack
        except Evicted:
            self.start_anew(actor)

    def let_wait(self, actor: _Actor, request: Pull) -> None:
        actor.wanted, actor.waits_since = request, self.clock.virtual_seconds
        self.waiting[actor.index] = actor

    def pull_there(self, actor: _Actor, life: int, request: Pull) -> None:
        if life != actor.life:
            return
        try:
            snapshot = actor.line.try_pull(request.max_staleness)
        except Evicted:
            self.start_anew(actor)
            return
        if snapshot is None:
            self.let_wait(actor, request)
        else:
            self.hand_out(actor, snapshot)

    def hand_out(self, actor: _Actor, snapshot: Any) -> None:
        self.num_events += 1
        self.note(actor, "pull", snapshot.version)
        if self.network is None:
            self.drive(actor, snapshot)
            return
        there = self.network.arrival("down", self.clock.virtual_seconds, snapshot.parcel.nbytes)
        self.at(there, self.resume, actor, actor.life, snapshot)

    def answer_waiting(self) -> None:
        """Something has changed: whoever may read now, reads, in the order of their numbers."""
        while self.waiting and self.seen != self.server.progress:
            self.seen = self.server.progress
            for index in sorted(self.waiting):
                actor = self.waiting.get(index)
                if actor is None or actor.frozen_until is not None:
                    continue
                assert actor.wanted is not None
                try:
                    snapshot = actor.line.try_pull(actor.wanted.max_staleness)
                except Evicted:
                    self.start_anew(actor)
                    continue
                if snapshot is None:
                    continue
                del self.waiting[index]
                self.waited[index] += self.clock.virtual_seconds - actor.waits_since
                self.hand_out(actor, snapshot)

    # Pushes.

    def send(self, actor: _Actor, request: Push) -> Ack | None:
        seq, parcel = actor.line.encode(request.update)
        self.note(actor, "send", seq)
        message = (actor.line, seq, parcel, request.base_version)
        if self.network is None:
            return self.push_there(actor, actor.life, *message)
        actor.in_flight, now = True, self.clock.virtual_seconds
        copies = 2 if self.network.comes_twice() else 1
        for copy in range(copies):
            there = self.network.arrival("up", now, parcel.nbytes)
            # The first copy's answer is the one that the worker waits for.
            self.at(there, self.push_there, actor, actor.life, *message, copy == 0, request.wait)
        return None

    def push_there(
        self,
        actor: _Actor,
        life: int,
        line: Connection,
        seq: int,
        parcel: Parcel,
        base_version: Any,
        answered: bool = False,
        waits: bool = False,
    ) -> Ack | None:
        """A push has come, though its sender may be dead."""
        self.num_events += 1
        try:
            ack = line.push(seq, parcel, base_version)
        except Evicted:
            self.note(actor, "fenced", seq)
            if self.network is None:
                raise
            if life == actor.life and answered:
                self.at(
                    self.network.arrival("down", self.clock.virtual_seconds, 0),
                    self.told_evicted,
                    actor,
                    life,
                )
            return None
        self.refused += not (ack.accepted or ack.duplicate)
        self.note(actor, "duplicate" if ack.duplicate else "push", seq)
        if answered and life == actor.life:
            assert self.network is not None
            there = self.network.arrival("down", self.clock.virtual_seconds, 0)
            self.at(there, self.acknowledged, actor, life, ack if waits else None, waits)
        return ack

    def acknowledged(self, actor: _Actor, life: int, ack: Ack | None, waits: bool) -> None:
        if life != actor.life:
            return
        if actor.frozen_until is not None:
            self.at(actor.frozen_until, self.acknowledged, actor, life, ack, waits)
            return
        actor.in_flight = False
        if waits:
            self.resume(actor, life, ack)
        elif actor.next_push is not None:
            request, actor.next_push = actor.next_push, None
            self.send(actor, request)
            if not request.wait:
                self.resume(actor, life, None)

    def told_evicted(self, actor: _Actor, life: int) -> None:
        if life == actor.life:
            self.start_anew(actor)

    # Outages.

    def strike(self, outage: Outage) -> None:
        actor = self.by_number[outage.worker]
        back = self.clock.virtual_seconds + outage.back_after_virtual_seconds
        self.note(actor, outage.kind, actor.line.incarnation)
        if outage.kind == "frozen":
            actor.frozen_until, actor.dead = back, back == math.inf
            self.at(back, self.thaw, actor, actor.life)
            return
        actor.dead = True
        actor.life += 1
        self.stop_counting(actor)
        actor.in_flight, actor.next_push = False, None
        self.waiting.pop(actor.index, None)
        self.at(back, self.start_anew, actor)

    def thaw(self, actor: _Actor, life: int) -> None:
        actor.frozen_until = None
        self.seen = -1  # whatever it waits for may be there already

    def start_anew(self, actor: _Actor) -> None:
        """As a newer incarnation; what it had computed and not sent is lost."""
        actor.life += 1
        actor.dead, actor.in_flight, actor.next_push = False, False, None
        self.waiting.pop(actor.index, None)
        incarnation = actor.line.incarnation + 1
        actor.line = Connection(self.server, actor.worker.number, incarnation)
        actor.run = actor.worker.run()
        self.note(actor, "registered", incarnation)
        self.at(self.clock.virtual_seconds, self.resume, actor, actor.life, None)

    def keep_leases(self) -> None:
        """The living say so; the server looks after the others."""
        for actor in self.actors:
            if not actor.dead and actor.frozen_until is None:
                try:
                    self.server.heartbeat(actor.worker.number, actor.line.incarnation)
                except Evicted:
                    continue  # it will be told when it next speaks
        self.server.expire()
        self.at(self.clock.virtual_seconds + self.server.lease / 4, self.keep_leases)
