"""Workers and server in virtual time: a discrete-event simulation.

The same server and the same workers as in any other backend; only waiting is replaced. What is
computed and what is sent is real, when it happens is drawn from a model of the clocks. Events of
one moment happen in the order in which they were scheduled, and every draw comes from the seed: a
run repeats itself bit for bit.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jdml.communicate.pace.arrivals import Arrivals
from jdml.communicate.pace.errors import Evicted, PaceError
from jdml.communicate.pace.sharded import AnyServer
from jdml.communicate.pace.virtual.agenda import Agenda
from jdml.communicate.pace.virtual.clock import VirtualClock, VirtualSeconds
from jdml.communicate.pace.virtual.crew import Crew
from jdml.communicate.pace.virtual.durations import Durations
from jdml.communicate.pace.virtual.network import Network, Traveller
from jdml.communicate.pace.virtual.outage import Outage
from jdml.communicate.pace.virtual.records import Evaluation, VirtualRun
from jdml.communicate.pace.workers.base import Worker


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
        self.server, self.clock = server, server.now
        self.agenda = Agenda(self.clock)
        traveller = None if network is None else Traveller(network, seed)
        self.crew = Crew(server, workers, self.agenda, durations, traveller, trace)
        by_number = {a.worker.number: a for a in self.crew.actors}
        for outage in outages:
            if outage.worker not in by_number:
                raise ValueError(f"simulate: {outage} names no worker.")
        self.outages = [(by_number[outage.worker], outage) for outage in outages]

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
        server, clock, agenda, crew = self.server, self.clock, self.agenda, self.crew
        evaluations: list[Evaluation] = []

        def look() -> None:
            if evaluate is not None:
                evaluations.append(
                    Evaluation(clock.virtual_seconds, server.version, evaluate(server.params))
                )

        look()
        start = float(clock.virtual_seconds)
        for actor, outage in self.outages:
            agenda.at(start + outage.virtual_seconds, crew.strike, actor, outage)
        if server.lease < math.inf:
            agenda.at(start + server.lease / 4, self.keep_leases)
        crew.begin()
        next_look, end = start + every, start + virtual_seconds
        versions_end = num_versions < math.inf
        while True:
            if crew.waiting:
                crew.answer_waiting()
            if crew.num_events >= num_events or (versions_end and server.version >= num_versions):
                break
            if len(agenda) < 2 and not self.anything_left():
                self.complain()
            now = agenda.next_time
            if now >= next_look or now > end:
                while next_look <= min(now, end):
                    clock.virtual_seconds = VirtualSeconds(next_look)
                    look()
                    next_look += every
                if now > end:
                    clock.virtual_seconds = VirtualSeconds(end)
                    break
            agenda.happen()
        look()
        crew.end()
        return VirtualRun(
            VirtualSeconds(clock.virtual_seconds - start),
            crew.num_events,
            evaluations,
            np.array(crew.computing),
            np.array(crew.waited),
            crew.refused,
            crew.trace or [],
        )

    def anything_left(self) -> bool:
        """Leases alone change nothing once nobody is left whose lease could end."""
        if not self.agenda:
            return False
        if not self.agenda.only(self.keep_leases):
            return True
        members = self.server.members()
        return any(a.dead and a.worker.number in members for a in self.crew.actors)

    def complain(self) -> None:
        waiting = sorted(a.worker.number for a in self.crew.waiting.values())
        dead = sorted(a.worker.number for a in self.crew.actors if a.dead)
        raise PaceError(
            f"at {self.clock.virtual_seconds:g} virtual seconds nothing can happen any more: "
            f"workers {waiting} wait; killed or frozen for good: {dead}. Members "
            f"and their clocks: { {w: m.clock for w, m in self.server.members().items()} }. A "
            "finite lease lets the server go on without the dead."
        )

    def keep_leases(self) -> None:
        """The living say so; the server looks after the others."""
        for actor in self.crew.actors:
            if not actor.dead and actor.frozen_until is None:
                try:
                    self.server.heartbeat(actor.worker.number, actor.line.incarnation)
                except Evicted:
                    continue  # it will be told when it next speaks
        self.server.expire()
        self.agenda.at(self.clock.virtual_seconds + self.server.lease / 4, self.keep_leases)
