"""The workers of a simulation: what each asks for, and when it is answered."""

import math
from collections.abc import Sequence
from typing import Any

from jdml.communicate.pace.connection import Connection, attach, detach, renew
from jdml.communicate.pace.errors import Evicted
from jdml.communicate.pace.messages import Ack
from jdml.communicate.pace.payload import Parcel
from jdml.communicate.pace.sharded import AnyServer
from jdml.communicate.pace.virtual.agenda import Agenda
from jdml.communicate.pace.virtual.durations import Durations
from jdml.communicate.pace.virtual.network import Traveller
from jdml.communicate.pace.virtual.outage import Outage
from jdml.communicate.pace.virtual.records import Event
from jdml.communicate.pace.workers.base import Compute, Pull, Push, Run, Worker


class Actor:
    """A worker in the simulation."""

    def __init__(self, index: int, worker: Worker) -> None:
        self.index, self.worker = index, worker
        self.run: Run
        self.line: Connection
        self.life = 0
        """Events of an earlier life do not happen."""
        self.steps = worker.num_steps
        self.in_flight = False
        self.next_push: Push | None = None
        self.wanted: Pull | None = None
        self.waits_since = 0.0
        self.busy_since = self.busy_until = 0.0
        self.dead = False
        self.frozen_until: float | None = None


class Crew:
    """All of them. Only what the agenda holds wakes one up, or a change at the server.

    Attributes:
      actors: In the order of their columns in the clocks.
      waiting: Those whose pull the server keeps waiting, by index.
      num_events: Computations, pushes that came, pulls that were answered.
      computing: Virtual seconds of local steps, per worker.
      waited: Virtual seconds that the server kept pulls waiting, per worker.
      refused: Pushes answered ``accepted=False``.
      trace: Every event, or ``None`` where nobody asked.
    """

    def __init__(
        self,
        server: AnyServer,
        workers: Sequence[Worker],
        agenda: Agenda,
        durations: Durations,
        network: Traveller | None,
        trace: bool,
    ) -> None:
        self.server, self.agenda, self.clock = server, agenda, agenda.clock
        self.durations, self.network = durations, network
        self.actors = [Actor(k, worker) for k, worker in enumerate(workers)]
        self.num_events = 0
        self.waiting: dict[int, Actor] = {}
        self._seen = -1
        self.computing = [0.0] * len(workers)
        self.waited = [0.0] * len(workers)
        self.refused = 0
        self.trace: list[Event] | None = [] if trace else None

    def begin(self) -> None:
        """Everybody registers, and asks for something."""
        lines = attach(self.server, [actor.worker for actor in self.actors])
        for actor, line in zip(self.actors, lines, strict=True):
            actor.line, actor.run = line, actor.worker.run()
        for actor in self.actors:
            self.drive(actor, None)

    def end(self) -> None:
        """Counts what is under way."""
        for actor in self.actors:
            self.stop_counting(actor)
            detach(actor.line, actor.worker)
        for actor in self.waiting.values():
            self.waited[actor.index] += self.clock.virtual_seconds - actor.waits_since

    def note(self, actor: Actor, what: str, number: int) -> None:
        if self.trace is not None:
            self.trace.append(Event(self.clock.virtual_seconds, actor.worker.number, what, number))

    # A worker's requests.

    def resume(self, actor: Actor, life: int, answer: Any) -> None:
        """An answer has come, to a worker that may have died, or be frozen, meanwhile."""
        if life != actor.life:
            return
        if actor.frozen_until is not None:
            self.agenda.at(actor.frozen_until, self.resume, actor, life, answer)
            return
        self.stop_counting(actor)
        self.drive(actor, answer)

    def stop_counting(self, actor: Actor) -> None:
        """Adds up what it has computed until now, if it did."""
        end, now = actor.busy_until, self.clock.virtual_seconds
        if end > 0.0:
            self.computing[actor.index] += max(0.0, (now if now < end else end) - actor.busy_since)
            actor.busy_since = actor.busy_until = 0.0

    def drive(self, actor: Actor, answer: Any) -> None:
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
                    if self.trace is not None:
                        self.note(actor, "compute", count)
                    self.agenda.at(now + took, self.resume, actor, actor.life, None)
                    return
                if isinstance(request, Pull):
                    if self.network is not None:
                        there = self.network.arrival("up", now, 0)
                        self.agenda.at(there, self.pull_there, actor, actor.life, request)
                        return
                    answer = actor.line.try_pull(request.max_staleness)
                    if answer is None:
                        self.let_wait(actor, request)
                        return
                    self.num_events += 1
                    if self.trace is not None:
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

    def let_wait(self, actor: Actor, request: Pull) -> None:
        actor.wanted, actor.waits_since = request, self.clock.virtual_seconds
        self.waiting[actor.index] = actor

    def pull_there(self, actor: Actor, life: int, request: Pull) -> None:
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

    def hand_out(self, actor: Actor, snapshot: Any) -> None:
        self.num_events += 1
        if self.trace is not None:
            self.note(actor, "pull", snapshot.version)
        if self.network is None:
            self.drive(actor, snapshot)
            return
        there = self.network.arrival("down", self.clock.virtual_seconds, snapshot.parcel.nbytes)
        self.agenda.at(there, self.resume, actor, actor.life, snapshot)

    def answer_waiting(self) -> None:
        """Something has changed: whoever may read now, reads, in the order of their numbers."""
        while self.waiting and self._seen != self.server.progress:
            self._seen = self.server.progress
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

    def send(self, actor: Actor, request: Push) -> Ack | None:
        seq, parcel = actor.line.encode(request.update)
        if self.trace is not None:
            self.note(actor, "send", seq)
        message = (actor.line, seq, parcel, request.base_version)
        if self.network is None:
            return self.push_there(actor, actor.life, *message)
        actor.in_flight, now = True, self.clock.virtual_seconds
        copies = 2 if self.network.comes_twice() else 1
        for copy in range(copies):
            there = self.network.arrival("up", now, parcel.nbytes)
            # The first copy's answer is the one that the worker waits for.
            self.agenda.at(
                there, self.push_there, actor, actor.life, *message, copy == 0, request.wait
            )
        return None

    def push_there(
        self,
        actor: Actor,
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
                self.agenda.at(
                    self.network.arrival("down", self.clock.virtual_seconds, 0),
                    self.told_evicted,
                    actor,
                    life,
                )
            return None
        self.refused += not (ack.accepted or ack.duplicate)
        if self.trace is not None:
            self.note(actor, "duplicate" if ack.duplicate else "push", seq)
        if answered and life == actor.life:
            assert self.network is not None
            there = self.network.arrival("down", self.clock.virtual_seconds, 0)
            self.agenda.at(there, self.acknowledged, actor, life, ack if waits else None, waits)
        return ack

    def acknowledged(self, actor: Actor, life: int, ack: Ack | None, waits: bool) -> None:
        if life != actor.life:
            return
        if actor.frozen_until is not None:
            self.agenda.at(actor.frozen_until, self.acknowledged, actor, life, ack, waits)
            return
        actor.in_flight = False
        if waits:
            self.resume(actor, life, ack)
        elif actor.next_push is not None:
            request, actor.next_push = actor.next_push, None
            self.send(actor, request)
            if not request.wait:
                self.resume(actor, life, None)

    def told_evicted(self, actor: Actor, life: int) -> None:
        if life == actor.life:
            self.start_anew(actor)

    # Outages.

    def strike(self, actor: Actor, outage: Outage) -> None:
        """It is killed, or frozen."""
        back = self.clock.virtual_seconds + outage.back_after_virtual_seconds
        self.note(actor, outage.kind, actor.line.incarnation)
        if outage.kind == "frozen":
            actor.frozen_until, actor.dead = back, back == math.inf
            self.agenda.at(back, self.thaw, actor, actor.life)
            return
        actor.dead = True
        actor.life += 1
        self.stop_counting(actor)
        actor.in_flight, actor.next_push = False, None
        self.waiting.pop(actor.index, None)
        self.agenda.at(back, self.start_anew, actor)

    def thaw(self, actor: Actor, life: int) -> None:
        actor.frozen_until = None
        self._seen = -1  # whatever it waits for may be there already

    def start_anew(self, actor: Actor) -> None:
        """As a newer incarnation; what it had computed and not sent is lost."""
        actor.life += 1
        actor.dead, actor.in_flight, actor.next_push = False, False, None
        self.waiting.pop(actor.index, None)
        actor.line = renew(actor.line, actor.worker)
        actor.run = actor.worker.run()
        self.note(actor, "registered", actor.line.incarnation)
        self.agenda.at(self.clock.virtual_seconds, self.resume, actor, actor.life, None)
