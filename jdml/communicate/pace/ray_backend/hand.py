"""A worker in a process of its own: what Ray makes an actor of."""

import contextlib
import dataclasses
import math
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jdml.communicate.pace.arrivals import Arrivals
from jdml.communicate.pace.connection import Connection, renew
from jdml.communicate.pace.drive import Pause, Tally, drive
from jdml.communicate.pace.errors import Evicted, PaceError
from jdml.communicate.pace.ray_backend.shard import on_host
from jdml.communicate.pace.virtual.durations import Durations
from jdml.communicate.pace.workers.base import Worker

LOOK_EVERY = 0.25
"""Wall seconds after which a pull that waits looks whether the run goes on."""
BEATS_PER_LEASE = 8


@dataclasses.dataclass(frozen=True)
class Orders:
    """What every worker's process is told; as for ``run_ray``."""

    make_worker: Callable[[int], Worker]
    num_devices: int | None
    slow_down: Arrivals | np.ndarray | None
    num_workers: int
    timeout: float | None
    num_versions: float
    rehearse: bool
    seed: int


class Report(NamedTuple):
    """What a worker's process has done so far."""

    pid: int
    incarnation: int
    num_steps: int
    tally: Tally
    returns: int


class Hand:
    """Drives one worker; reports, and can be stopped, from other threads.

    A worker that the server has evicted though it lives (it was slow, or the server was lost)
    returns as a newer incarnation; one whose number another process has taken does not.

    Args:
      number: Which worker.
      server: A :class:`RayServer` or :class:`ShardedRayServer`.
      orders: What to do.
      state: Of ``Worker.state``, to go on from.
      num_steps: Local steps that an earlier process had taken.
    """

    def __init__(
        self,
        number: int,
        server: Any,
        orders: Orders,
        state: dict[str, Any] | None,
        num_steps: int,
    ) -> None:
        if orders.num_devices is not None:
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_num_cpu_devices", orders.num_devices)
        self._number, self._server, self._orders = number, server, orders
        self._worker = orders.make_worker(number)
        if self._worker.number != number:
            raise ValueError(
                f"make_worker({number}) made worker {self._worker.number}: it must take the number "
                "that it is given."
            )
        if state is not None:
            self._worker.load_state(state, server.params)
        self._worker.num_steps = max(self._worker.num_steps, num_steps)
        self._tally, self._returns, self._incarnation = Tally(), 0, -1
        self._stop = threading.Event()
        self._pause = _pauses(orders)
        self._prepared = False

    def prepare(self) -> Report:
        """Compiles what it will run, if it is to."""
        if self._orders.rehearse and not self._prepared:
            update = self._worker.rehearse(self._server.params)
            self._server.sender(self._number)(update, 0)
        self._prepared = True
        return self.report()

    def run(self) -> tuple[Report, dict[str, Any]]:
        """Works until the run is over; what it did, and the worker's state."""
        self.prepare()
        line = self._registered()
        with self._beating():
            while not self._stop.is_set():
                self._incarnation = line.incarnation
                try:
                    drive(
                        self._worker,
                        line,
                        self._stop,
                        tally=self._tally,
                        pause=self._pause,
                        timeout=self._orders.timeout,
                        num_versions=self._orders.num_versions,
                        look_every=LOOK_EVERY,
                    )
                except Evicted:
                    if self._server.last_incarnation(self._number) > line.incarnation:
                        raise
                    line = renew(line, self._worker)
                    self._returns += 1
        self._worker.residual = line.sender.residual
        return self.report(), jax.tree.map(on_host, self._worker.state())

    def stop(self) -> None:
        """Ends the run after the local steps that are under way, whose update is delivered."""
        self._stop.set()

    def report(self) -> Report:
        tally = dataclasses.replace(self._tally)
        return Report(os.getpid(), self._incarnation, self._worker.num_steps, tally, self._returns)

    def _registered(self) -> Connection:
        """As the next incarnation: what an earlier process did not send is lost."""
        known = self._server.last_incarnation(self._number)
        self._worker.lose_unsent()
        line = Connection(self._server, self._number, known + 1)
        line.sender.residual = self._worker.residual
        return line

    @contextlib.contextmanager
    def _beating(self) -> Iterator[None]:
        """Says that this process lives, however long its worker computes."""
        lease, over = self._server.lease, threading.Event()

        def beat() -> None:
            while not over.wait(lease / BEATS_PER_LEASE):
                # Whatever is wrong, the worker itself will be told.
                with contextlib.suppress(PaceError):
                    self._server.heartbeat(self._number, self._incarnation)

        thread = threading.Thread(target=beat)
        if lease < math.inf:
            thread.start()
        try:
            yield
        finally:
            over.set()
            if thread.ident is not None:
                thread.join()


def _pauses(orders: Orders) -> Pause | None:
    if orders.slow_down is None:
        return None
    durations = Durations(orders.slow_down, orders.num_workers, orders.seed)
    return durations.total
