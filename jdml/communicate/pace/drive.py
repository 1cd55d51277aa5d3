"""Drives a worker in wall time: answers its requests by calling the server, and waits.

For every backend whose workers have a thread or a process of their own; virtual time has a loop
that never waits. What the worker asks for decides what may be interrupted: a run that is told to
stop lets a computation end and delivers what came of it, so that the server's clocks and the
workers' counters agree afterwards.
"""

import dataclasses
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import jax

from jdml.communicate.pace.connection import Connection
from jdml.communicate.pace.errors import StaleTimeout
from jdml.communicate.pace.messages import Ack
from jdml.communicate.pace.workers.base import Compute, Pull, Push, Worker

Pause = Callable[[int, int, int], float]
"""``(worker, index, count) -> wall seconds`` that ``count`` local steps from ``index`` on are
prolonged by."""

LOOK_EVERY = 0.05
"""Wall seconds after which a pull that waits looks whether the run goes on."""


@dataclasses.dataclass
class Tally:
    """What a driven worker did, in wall seconds; its driver alone writes it.

    Attributes:
      computing_wall_seconds: Local steps, pauses included, until their results were there.
      waiting_wall_seconds: Pulls: the wait for the others, and the transfer.
      pushing_wall_seconds: Pushes that the worker waited for.
      num_steps: Local steps that were answered.
      num_pushes: Pushes that were acknowledged.
      refused: Those of them that came too late to count.
    """

    computing_wall_seconds: float = 0.0
    waiting_wall_seconds: float = 0.0
    pushing_wall_seconds: float = 0.0
    num_steps: int = 0
    num_pushes: int = 0
    refused: int = 0


def drive(
    worker: Worker,
    line: Connection,
    stop: threading.Event,
    *,
    tally: Tally | None = None,
    pause: Pause | None = None,
    timeout: float | None = None,
    num_versions: float = math.inf,
    look_every: float = LOOK_EVERY,
) -> None:
    """Runs one incarnation of a worker until ``stop`` is set.

    ``stop`` is looked at before a pull and before a computation, and a pull that waits is given up;
    a push is always delivered.

    Args:
      worker: What to run, on the devices that are this thread's.
      line: Its registration; the server may be anywhere.
      stop: Set by anybody, and here once the server has reached ``num_versions``.
      tally: Where to count; one that has counted goes on.
      pause: Wall seconds by which local steps are prolonged: a slow worker.
      timeout: Wall seconds that a pull may take; ``None``: as long as it takes.
      num_versions: Version of the server at which the run is over.
      look_every: Wall seconds after which a pull that waits looks at ``stop``.

    Raises:
      StaleTimeout: a pull took longer; the others are named.
      Evicted: the worker is no member any more.
      Closed: the server was closed.
      Exception: whatever the task raised.
    """
    tally = Tally() if tally is None else tally
    requests, answer = worker.run(), None
    with _Post(line, tally) as post:
        while True:
            began = time.monotonic()
            request = requests.send(answer)
            if isinstance(request, Push):
                jax.block_until_ready(request.update)
            tally.computing_wall_seconds += time.monotonic() - began
            answer = None
            if isinstance(request, Push):
                answer = post.push(request)
                if post.version >= num_versions:
                    stop.set()
            elif stop.is_set():
                return
            elif isinstance(request, Pull):
                began = time.monotonic()
                answer = pulled(line, request.max_staleness, stop, timeout, look_every)
                tally.waiting_wall_seconds += time.monotonic() - began
                if answer is None:
                    return
            else:
                prolong(worker, request, stop, tally, pause)
                if stop.is_set():
                    return


def pulled(
    line: Connection,
    max_staleness: float | None,
    stop: threading.Event,
    timeout: float | None = None,
    look_every: float = LOOK_EVERY,
) -> Any:
    """A snapshot, or ``None`` if ``stop`` was set before there was one."""
    end = math.inf if timeout is None else time.monotonic() + timeout
    while not stop.is_set():
        left = max(end - time.monotonic(), 0.0)
        try:
            return line.pull(max_staleness, min(look_every, left))
        except StaleTimeout as error:
            if left <= look_every:
                _, _, why = str(error).partition(": ")
                raise StaleTimeout(f"worker {line.worker} waited {timeout:g} s: {why}") from None
    return None


def prolong(
    worker: Worker, request: Compute, stop: threading.Event, tally: Tally, pause: Pause | None
) -> None:
    """Sleeps for as long as the steps that follow are said to take more than they do."""
    if pause is not None:
        began = time.monotonic()
        seconds = pause(worker.number, worker.num_steps, request.num_steps)
        if seconds > 0:
            stop.wait(seconds)
        tally.computing_wall_seconds += time.monotonic() - began
    if not stop.is_set():
        tally.num_steps += request.num_steps


class _Post:
    """Delivers a worker's pushes in their order: at once, or beside its next computation."""

    def __init__(self, line: Connection, tally: Tally) -> None:
        self._line, self._tally = line, tally
        self._courier: ThreadPoolExecutor | None = None
        self._on_its_way: Future[Ack] | None = None
        self.version = 0
        """The server's newest version that an answer has told."""

    def push(self, request: Push) -> Ack | None:
        """The answer; ``None`` at once where the worker goes on while its update travels."""
        began = time.monotonic()
        self.settle()
        seq, parcel = self._line.encode(request.update)
        ack: Ack | None = None
        if request.wait:
            ack = self._noted(self._line.push(seq, parcel, request.base_version))
        else:
            if self._courier is None:
                name = f"{threading.current_thread().name} courier"
                self._courier = ThreadPoolExecutor(1, thread_name_prefix=name)
            self._on_its_way = self._courier.submit(
                self._line.push, seq, parcel, request.base_version
            )
        self._tally.pushing_wall_seconds += time.monotonic() - began
        return ack

    def settle(self) -> None:
        """Waits until the last push has come."""
        sent, self._on_its_way = self._on_its_way, None
        if sent is not None:
            self._noted(sent.result())

    def _noted(self, ack: Ack) -> Ack:
        self.version = max(self.version, ack.version)
        self._tally.num_pushes += 1
        self._tally.refused += not (ack.accepted or ack.duplicate)
        return ack

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        if self._courier is not None:
            self._courier.shutdown(wait=True)
        if kind is None:
            self.settle()
