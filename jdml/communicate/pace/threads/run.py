"""Workers and server in wall time: a thread for each worker, the server among them.

Nobody waits inside a compiled program: a thread computes on a device of its own, and waits in
Python. Threads are never daemons, because one that runs JAX while the interpreter exits crashes
it; an event tells them to stop.
"""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jdml.communicate.pace.arrivals import Arrivals
from jdml.communicate.pace.connection import Connection, attach, detach
from jdml.communicate.pace.drive import Pause, Tally, drive
from jdml.communicate.pace.errors import PaceError
from jdml.communicate.pace.sharded import AnyServer
from jdml.communicate.pace.supervise import OnFailure, Supervisor
from jdml.communicate.pace.threads.wall import WallEvaluation, WallRun
from jdml.communicate.pace.virtual.clock import VirtualClock
from jdml.communicate.pace.virtual.durations import Durations
from jdml.communicate.pace.workers.base import Worker


def run_threads(
    server: AnyServer,
    workers: Sequence[Worker],
    *,
    seconds: float = math.inf,
    num_versions: float = math.inf,
    devices: Sequence[jax.Device | None] | None = None,
    slow_down: Arrivals | np.ndarray | None = None,
    evaluate: Callable[[Any], Any] | None = None,
    evaluate_every_seconds: float = math.inf,
    timeout: float | None = None,
    heartbeat: bool = False,
    on_failure: OnFailure = "end",
    max_restarts: int = 3,
    rehearse: bool = True,
    grace_seconds: float = 60.0,
    seed: int = 0,
) -> WallRun:
    """Runs the workers against the server, each in a thread, until the first of two limits.

    Afterwards all threads have ended, what was computed has been pushed, and server and workers may
    be given to another run, which goes on from there. Ctrl-C ends a run in the same way before
    ``KeyboardInterrupt`` reaches the caller.

    A published snapshot is handed to a worker as it is, read-only and without a copy: a task must
    not donate the parameters that it is given.

    Args:
      server: Whose ``now`` is a wall clock. A finite lease frees the others from a worker that
        hangs; it must be longer than a worker computes between its calls, or see ``heartbeat``.
      workers: As many as the server starts with. Each may have several devices: one whose task
        computes on a mesh of its own.
      seconds: The run's length in wall seconds, at most, but for steps that are under way.
      num_versions: Stops when the server's version has grown to this; asynchronously, updates that
        were being computed may take it a little farther.
      devices: Where the k-th worker's thread computes by default: ``devices[k % len(devices)]``;
        ``None`` among them leaves it to the task. By default ``jax.local_devices()``.
      slow_down: Wall seconds that every local step is prolonged by, asleep: an :data:`Arrivals`, of
        which column k is the k-th worker's, or floats ``[num_steps, num_workers]``.
      evaluate: ``params -> value``, called in the caller's thread before the start, at the end and
        every ``evaluate_every_seconds`` of wall time.
      evaluate_every_seconds: > 0.
      timeout: Wall seconds that a worker may wait for the others before the run ends with
        `StaleTimeout`; ``None``: as long as it takes.
      heartbeat: Whether the run speaks for workers while they compute, so that a lease ends for
        none that has a thread.
      on_failure: When a worker raises: ``"end"`` the run, ``"evict"`` it and go on, or
        ``"restart"`` it as a newer incarnation that goes on from its counters.
      max_restarts: How often each worker may be started anew.
      rehearse: Whether every worker takes two local steps that leave no trace before the clock
        starts, so that compiling is not measured.
      grace_seconds: How long a worker may take to stop at the end.
      seed: Of ``slow_down``.

    Raises:
      ValueError: no limit, another number of workers, two of one number, or a server in virtual
        time.
      PaceError: a worker failed, or does not stop; the message says which and why.
      StaleTimeout: a worker waited longer than ``timeout``; the message says for whom.
    """
    if min(seconds, num_versions) == math.inf:
        raise ValueError("run_threads: the run would have no end; give seconds or num_versions.")
    if isinstance(server.now, VirtualClock):
        raise ValueError(
            "run_threads: the server's time is virtual; make it without now=VirtualClock()."
        )
    if not evaluate_every_seconds > 0:
        raise ValueError(f"run_threads(evaluate_every_seconds={evaluate_every_seconds!r}): > 0.")
    places = list(jax.local_devices() if devices is None else devices)
    if not places:
        raise ValueError("run_threads(devices=[]): expected at least one device, or None.")
    crew = _Crew(
        server,
        workers,
        places,
        Supervisor(server, on_failure, max_restarts),
        _pause(slow_down, len(workers), seed),
        timeout,
        num_versions,
    )
    evaluations: list[WallEvaluation] = []

    def look(wall_seconds: float) -> None:
        if evaluate is not None:
            version, params = server.version, server.params
            evaluations.append(WallEvaluation(wall_seconds, version, evaluate(params)))

    look(0.0)
    began, took = time.monotonic(), 0.0
    try:
        crew.start(rehearse, heartbeat)
        began = time.monotonic()
        next_look = evaluate_every_seconds
        while not crew.stop.is_set():
            now = time.monotonic() - began
            if now >= seconds or server.version >= num_versions:
                break
            if now >= next_look:
                look(now)
                next_look += evaluate_every_seconds * math.ceil(
                    (time.monotonic() - began - next_look) / evaluate_every_seconds
                )
            crew.stop.wait(min(seconds - now, next_look - now, 60.0))
    finally:
        crew.end(grace_seconds)
        took = time.monotonic() - began
    look(took)
    return crew.report(took, evaluations)


def _pause(slow_down: Arrivals | np.ndarray | None, num_workers: int, seed: int) -> Any:
    """``(place, index, count) -> wall seconds``, or ``None``."""
    if slow_down is None:
        return None
    durations, first = Durations(slow_down, num_workers, seed), jax.local_devices()[0]

    def pause(place: int, index: int, count: int) -> float:
        with jax.default_device(first):  # drawn by one program, whoever asks
            return durations.total(place, index, count)

    pause(0, 0, 1)
    return pause


class _Hand:
    """A worker, its thread and its line."""

    def __init__(self, worker: Worker, line: Connection, device: jax.Device | None) -> None:
        self.worker, self.line, self.device = worker, line, device
        self.tally = Tally()
        self.thread = threading.Thread()
        self.ready = threading.Event()


class _Crew:
    """The threads of a run."""

    def __init__(
        self,
        server: AnyServer,
        workers: Sequence[Worker],
        devices: Sequence[jax.Device | None],
        supervisor: Supervisor,
        pause: Any,
        timeout: float | None,
        num_versions: float,
    ) -> None:
        self.server, self.supervisor, self.pause = server, supervisor, pause
        self.timeout, self.num_versions = timeout, num_versions
        self.stop, self.go = threading.Event(), threading.Event()
        self.error: BaseException | None = None
        self.watch = threading.Thread()
        lines = attach(server, workers)
        self.hands = [
            _Hand(worker, line, devices[k % len(devices)])
            for k, (worker, line) in enumerate(zip(workers, lines, strict=True))
        ]

    # In the caller's thread.

    def start(self, rehearse: bool, heartbeat: bool) -> None:
        """Starts every thread, and lets them go once all have compiled what they will run."""
        params = self.server.params if rehearse else None
        for k, hand in enumerate(self.hands):
            hand.thread = threading.Thread(
                target=self._work, args=(k, hand, params), name=f"worker {hand.worker.number}"
            )
        for hand in self.hands:
            hand.thread.start()
        for hand in self.hands:
            hand.ready.wait()
        for hand in self.hands:
            # Compiling was no silence.
            with contextlib.suppress(PaceError):
                self.server.heartbeat(hand.line.worker, hand.line.incarnation)
        if self.server.lease < math.inf:
            self.watch = threading.Thread(target=self._look_after_leases, args=(heartbeat,))
            self.watch.start()
        self.go.set()

    def end(self, grace_seconds: float) -> None:
        """Stops the threads and waits for them; raises what ended the run, if something did."""
        self.stop.set()
        self.go.set()
        last = time.monotonic() + grace_seconds
        for thread in [*(hand.thread for hand in self.hands), self.watch]:
            if thread.ident is not None:  # else Ctrl-C came before it was started
                thread.join(max(0.0, last - time.monotonic()))
        for hand in self.hands:
            detach(hand.line, hand.worker)
        if self.error is not None:
            raise self.error
        late = sorted(hand.worker.number for hand in self.hands if hand.thread.is_alive())
        if late:
            raise PaceError(
                f"workers {late} have not stopped {grace_seconds:g} s after the end of the run: "
                "their local steps hang. Their threads keep the process alive until they return."
            )

    def report(self, wall_seconds: float, evaluations: list[WallEvaluation]) -> WallRun:
        tallies = [hand.tally for hand in self.hands]
        return WallRun(
            wall_seconds,
            evaluations,
            np.array([t.computing_wall_seconds for t in tallies]),
            np.array([t.waiting_wall_seconds for t in tallies]),
            np.array([t.pushing_wall_seconds for t in tallies]),
            np.array([t.num_steps for t in tallies]),
            np.array([t.num_pushes for t in tallies]),
            sum(t.refused for t in tallies),
            dict(self.supervisor.restarts),
            dict(self.supervisor.returns),
            dict(self.supervisor.gone),
        )

    # In the other threads.

    def _work(self, place: int, hand: _Hand, params: Any) -> None:
        place_of = None if self.pause is None else _at_place(self.pause, place)
        try:
            with (
                contextlib.nullcontext() if hand.device is None else jax.default_device(hand.device)
            ):
                self._rehearse(hand, params)
                hand.ready.set()
                self.go.wait()
                while not self.stop.is_set():
                    try:
                        drive(
                            hand.worker,
                            hand.line,
                            self.stop,
                            tally=hand.tally,
                            pause=place_of,
                            timeout=self.timeout,
                            num_versions=self.num_versions,
                        )
                        return
                    except Exception as error:
                        renewed = self.supervisor.settle(hand.worker, hand.line, error)
                        if renewed is None:
                            return
                        hand.line = renewed
        except BaseException as error:
            self._fail(error)
        finally:
            hand.ready.set()

    def _rehearse(self, hand: _Hand, params: Any) -> None:
        if params is None:
            return
        try:
            update = hand.worker.rehearse(params)
            self.server.sender(hand.worker.number)(update, 0)
        except Exception:
            # The run itself will meet it, count it, and know what to do.
            return

    def _fail(self, error: BaseException) -> None:
        if self.error is None:
            self.error = error
        self.stop.set()

    def _look_after_leases(self, heartbeat: bool) -> None:
        while not self.stop.wait(self.server.lease / 4):
            if heartbeat:
                for hand in self.hands:
                    if hand.thread.is_alive():
                        with contextlib.suppress(PaceError):
                            self.server.heartbeat(hand.line.worker, hand.line.incarnation)
            self.server.expire()


def _at_place(pause: Any, place: int) -> Pause:
    return lambda worker, index, count: pause(place, index, count)
