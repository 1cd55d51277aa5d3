"""Workers and server in processes: what runs them, and sees to it that a run survives them."""

import copy
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, get_args

import numpy as np

from jdml.communicate.pace.arrivals import Arrivals
from jdml.communicate.pace.errors import Closed, PaceError, StaleTimeout
from jdml.communicate.pace.ray_backend.crew import Failed, Post
from jdml.communicate.pace.ray_backend.errors import Unreachable
from jdml.communicate.pace.ray_backend.hand import Orders
from jdml.communicate.pace.ray_backend.keeper import Keeper
from jdml.communicate.pace.ray_backend.result import Happening, RayRun
from jdml.communicate.pace.ray_backend.server import START_SECONDS, RayServer, ShardedRayServer
from jdml.communicate.pace.ray_backend.session import ray_in_session
from jdml.communicate.pace.supervise import OnFailure
from jdml.communicate.pace.threads.wall import WallEvaluation
from jdml.communicate.pace.workers.base import Worker

TICK = 0.05


def run_ray(
    server: Any,
    make_worker: Callable[[int], Worker],
    *,
    seconds: float = math.inf,
    num_versions: float = math.inf,
    num_devices: int | None = None,
    slow_down: Arrivals | np.ndarray | None = None,
    evaluate: Callable[[Any], Any] | None = None,
    evaluate_every_seconds: float = math.inf,
    timeout: float | None = None,
    on_failure: OnFailure = "restart",
    max_restarts: int = 3,
    snapshot_every_seconds: float = 10.0,
    worker_states: Mapping[int, dict[str, Any]] | None = None,
    worker_options: Mapping[str, Any] | None = None,
    rehearse: bool = True,
    grace_seconds: float = 60.0,
    seed: int = 0,
    stop: threading.Event | None = None,
    on_happening: Callable[[Happening], None] | None = None,
) -> RayRun:
    """Runs a worker process for each number against the server, until the first of two limits.

    Each worker is a process of its own with its own JAX, so it may have a mesh of its own: a whole
    SPMD program. What fails is replaced while the others go on:

    - a worker that dies, raises, or does not answer for as long as the server's lease is evicted,
      so that nobody waits for it, and started anew as ``on_failure`` says, as a newer incarnation
      that goes on from its count of local steps. What it had not pushed is lost, and so is what
      its optimiser remembered.
    - a server that dies, or does not answer for as long, is started anew by Ray and given its last
      snapshot; all workers then register as newer incarnations. Updates since are lost, of that
      shard alone.

    On the wire, for each push and pull: as :class:`RayServer`; and every ``snapshot_every_seconds``
    all that the server holds, to this process.

    Args:
      server: From :func:`ray_server`; it goes on to live after the run.
      make_worker: ``number -> Worker`` for 0, 1, …, called in the worker's process.
      seconds: The run's length in wall seconds, at most, but for steps that are under way.
      num_versions: Stops when the server's version has grown to this, or a little later.
      num_devices: Simulated CPU devices of each worker's process; ``None``: whatever JAX finds.
      slow_down: Wall seconds that every local step is prolonged by, asleep: an :data:`Arrivals`, of
        which column k is worker k's, or floats ``[num_steps, num_workers]``.
      evaluate: ``params -> value``, called here at the start, at the end and every
        ``evaluate_every_seconds`` of wall time.
      evaluate_every_seconds: > 0.
      timeout: Wall seconds that a worker may wait for the others before the run ends with
        `StaleTimeout`; ``None``: as long as it takes.
      on_failure: When a worker fails: ``"end"`` the run, ``"evict"`` it and go on, or
        ``"restart"`` it.
      max_restarts: How often each worker may be started anew; once more ends the run.
      snapshot_every_seconds: > 0; between two snapshots of the server.
      worker_states: What workers go on from, by number: ``worker_states`` of an earlier run.
      worker_options: As for Ray's ``.options``, such as ``{"num_cpus": 4, "num_gpus": 1}``; by
        default a worker takes none of what Ray counts.
      rehearse: Whether every worker takes two local steps that leave no trace before the clock
        starts, so that compiling is not measured.
      grace_seconds: How long a worker may take to stop at the end; then it is killed.
      seed: Of ``slow_down``.
      stop: Ends the run when somebody sets it.
      on_happening: Called here with every :class:`Happening`.

    Raises:
      ImportError: Ray is not installed.
      ValueError: no limit, a server that is none of Ray's, or there is no Ray session.
      PaceError: a worker or a server failed for good; the message says which and why.
      StaleTimeout: a worker waited longer than ``timeout``; the message says for whom.
    """
    ray_in_session()
    if not isinstance(server, RayServer | ShardedRayServer):
        raise ValueError(
            f"run_ray: expected a server made by ray_server(...), got {type(server).__name__}: the "
            "others live in this process, where run_threads runs workers."
        )
    if min(seconds, num_versions) == math.inf:
        raise ValueError("run_ray: the run would have no end; give seconds or num_versions.")
    for name, value in (
        ("evaluate_every_seconds", evaluate_every_seconds),
        ("snapshot_every_seconds", snapshot_every_seconds),
    ):
        if not value > 0:
            raise ValueError(f"run_ray({name}={value!r}): expected > 0.")
    if on_failure not in get_args(OnFailure) or max_restarts < 0:
        raise ValueError(
            f"run_ray(on_failure={on_failure!r}, max_restarts={max_restarts!r}): expected one of "
            f"{get_args(OnFailure)}, and a number >= 0."
        )
    orders = Orders(
        make_worker,
        num_devices,
        slow_down,
        server.num_workers,
        timeout,
        num_versions,
        rehearse,
        seed,
    )
    run = _Run(server, orders, on_failure, max_restarts, on_happening)
    try:
        run.start(dict(worker_states or {}), worker_options or {}, snapshot_every_seconds)
        run.work(seconds, num_versions, evaluate, evaluate_every_seconds, stop)
        return run.end(grace_seconds, evaluate)
    finally:
        run.kill()


class _Run:
    """One run, seen from the process that asked for it."""

    def __init__(
        self,
        server: Any,
        orders: Orders,
        on_failure: OnFailure,
        max_restarts: int,
        on_happening: Callable[[Happening], None] | None,
    ) -> None:
        self.ray = ray_in_session()
        self.server, self.orders = server, orders
        self.on_failure, self.max_restarts = on_failure, max_restarts
        self.on_happening = on_happening
        self.posts: list[Post] = []
        self.keepers: list[Keeper] = []
        self.evaluations: list[WallEvaluation] = []
        self.happenings: list[Happening] = []
        self.restarts: Counter[int] = Counter()
        self.gone: dict[int, str] = {}
        self.num_restored = 0
        self.to_evict: dict[int, str] = {}
        self.began = time.monotonic()
        # This process must not wait for a server that it has to restore itself.
        self.impatient = _impatient(server)

    @property
    def now(self) -> float:
        return time.monotonic() - self.began

    @property
    def present(self) -> list[Post]:
        return [post for post in self.posts if post.number not in self.gone]

    def start(self, states: dict[int, Any], options: Mapping[str, Any], every: float) -> None:
        """Starts all processes; the clock begins when all have compiled."""
        frozen_after = self.server.lease if self.server.lease < math.inf else START_SECONDS
        shards = getattr(self.server, "servers", [self.server])
        options = {"num_cpus": 0, "max_restarts": 0, "max_concurrency": 4, **options}
        for number in range(self.orders.num_workers):
            self.posts.append(
                Post(
                    number,
                    self.server,
                    self.orders,
                    states.get(number),
                    options,
                    frozen_after,
                    self.started,
                )
            )
        for post, ready in [(post, post.prepare()) for post in self.posts]:
            try:
                post.take(post.got(ready))
            except Failed as failed:
                raise PaceError(f"worker {post.number} could not start: {failed}") from failed.cause
        self.keepers = [Keeper(shard, every, frozen_after, self.tell) for shard in shards]
        self.began = time.monotonic()

    def work(
        self,
        seconds: float,
        num_versions: float,
        evaluate: Callable[[Any], Any] | None,
        every: float,
        stop: threading.Event | None,
    ) -> None:
        """Until the run is over."""
        self.look(evaluate)
        self.began = time.monotonic()
        for post in self.posts:
            post.run()
        next_look = every
        while self.now < seconds and self.version < num_versions:
            self.wait()
            if stop is not None and stop.is_set():
                return
            if any(post.ended for post in self.present):
                return  # it saw the last version
            if self.now >= next_look and self.look(evaluate):
                next_look += every * max(1, math.ceil((self.now - next_look) / every))

    def end(self, grace_seconds: float, evaluate: Callable[[Any], Any] | None) -> RayRun:
        """Stops the workers, waits for them, and says what it was."""
        for post in self.present:
            post.stop()
        self.on_failure = "evict"  # nobody is started for a run that is over
        last = time.monotonic() + grace_seconds
        while any(not post.ended for post in self.present) and time.monotonic() < last:
            self.wait(ending=True)
        for post in self.present:
            if not post.ended:
                self.leave_out(post, f"it did not stop within {grace_seconds:g} s of the run's end")
        took = self.now
        while not self.look(evaluate, took) and time.monotonic() < last:
            self.wait(ending=True)
        tallies = [post.tally for post in self.posts]
        return RayRun(
            took,
            self.evaluations,
            np.array([t.computing_wall_seconds for t in tallies]),
            np.array([t.waiting_wall_seconds for t in tallies]),
            np.array([t.pushing_wall_seconds for t in tallies]),
            np.array([t.num_steps for t in tallies]),
            np.array([t.num_pushes for t in tallies]),
            sum(t.refused for t in tallies),
            dict(self.restarts),
            {post.number: post.returns for post in self.posts if post.returns},
            self.gone,
            self.happenings,
            {post.number: post.state for post in self.posts if post.state is not None},
        )

    def kill(self) -> None:
        """Ends the workers' processes, whatever has happened."""
        for post in self.posts:
            post.end()

    # One turn of the loop.

    def wait(self, *, ending: bool = False) -> None:
        """Until something comes, but not for long; then sees to it."""
        awaited = [ref for keeper in self.keepers for ref in keeper.awaited]
        awaited += [ref for post in self.present for ref in post.awaited]
        if awaited:
            self.ray.wait(awaited, num_returns=1, timeout=TICK)
        else:
            time.sleep(TICK)
        for keeper in self.keepers:
            keeper.look()
        restored = sum(keeper.num_restored for keeper in self.keepers)
        if restored > self.num_restored:
            # The snapshot remembers those that have left since.
            self.num_restored, self.to_evict = restored, dict(self.gone)
        for post in self.present:
            try:
                post.look()
            except Failed as failed:
                self.settle(post, failed, ending)
        self.evict_all()

    def settle(self, post: Post, failed: Failed, ending: bool) -> None:
        """What becomes of a worker that failed."""
        if isinstance(failed.cause, Closed) and ending:
            self.leave_out(post, str(failed))
            return
        if isinstance(failed.cause, Closed | StaleTimeout | Unreachable) and not ending:
            raise failed.cause
        number = post.number
        why = f"worker {number} failed after {post.num_steps} local steps: {failed}"
        self.tell("failed", f"worker {number}", str(failed))
        if ending or self.on_failure == "evict":
            self.leave_out(post, why)
            if len(self.gone) == len(self.posts) and not ending:
                raise PaceError(f"no worker is left: {'; '.join(self.gone.values())}.")
            return
        if self.on_failure == "end":
            raise PaceError(f"{why}. on_failure='restart' starts it anew.") from failed.cause
        if self.restarts[number] >= self.max_restarts:
            raise PaceError(
                f"{why}. It was started anew {self.max_restarts} times before (max_restarts)."
            ) from failed.cause
        self.restarts[number] += 1
        post.end()
        self.to_evict[number] = why
        self.evict_all()
        # Nobody waits for it any more; its successor takes its place, evicted or not.
        self.to_evict.pop(number, None)
        post.begin_anew()

    def leave_out(self, post: Post, why: str) -> None:
        post.end()
        self.gone[post.number] = self.to_evict[post.number] = why
        self.tell("gone", f"worker {post.number}", why)

    def evict_all(self) -> None:
        """Tells the servers who is out; those that cannot be reached are told later."""
        for number, why in list(self.to_evict.items()):
            try:
                self.impatient.evict(number, why)
            except (Unreachable, Closed):
                continue
            del self.to_evict[number]

    def look(self, evaluate: Callable[[Any], Any] | None, at: float | None = None) -> bool:
        """Evaluates; ``False`` if the server is not there just now."""
        if evaluate is None:
            return True
        try:
            version, params = self.impatient.version, self.impatient.params
        except Unreachable:
            return False
        now = (self.now if self.posts and self.evaluations else 0.0) if at is None else at
        self.evaluations.append(WallEvaluation(now, version, evaluate(params)))
        return True

    @property
    def version(self) -> int:
        """The least of the servers', as they last said."""
        return min(keeper.version for keeper in self.keepers)

    def started(self, number: int, pid: int) -> None:
        self.tell("started", f"worker {number}", "", pid)

    def tell(self, what: Any, who: str, why: str, pid: int | None = None) -> None:
        happening = Happening(self.now, what, who, why, pid)
        self.happenings.append(happening)
        if self.on_happening is not None:
            self.on_happening(happening)


def _impatient(server: Any) -> Any:
    """The same server, for a caller that would rather be told than wait."""
    server = copy.copy(server)
    if isinstance(server, ShardedRayServer):
        server._pool, server.servers = None, [_impatient(shard) for shard in server.servers]
        return server
    server.patience, server.call_seconds = 0.0, min(server.call_seconds, 10.0)
    return server
