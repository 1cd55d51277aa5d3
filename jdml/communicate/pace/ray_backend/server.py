"""A server that is another process, with the methods of one that is here."""

import contextlib
import math
import re
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from jdml.communicate.pace.errors import StaleTimeout
from jdml.communicate.pace.messages import Ack, MemberInfo, Registration, Snapshot, Traffic
from jdml.communicate.pace.payload import Format, Parcel, Sender, frozen, split_content
from jdml.communicate.pace.ray_backend.errors import NotRestored, Unreachable
from jdml.communicate.pace.ray_backend.session import import_ray, ray_in_session
from jdml.communicate.pace.ray_backend.shard import SHARED_FROM, Shard
from jdml.communicate.pace.ray_backend.shelf import (
    Elsewhere,
    Reader,
    Shelf,
    Stale,
    Ticket,
    machine,
)
from jdml.communicate.pace.rules.base import Rule
from jdml.communicate.pace.server import Server
from jdml.communicate.pace.sharded import ShardedServer

PyTree = Any

LEASE_OF_SHARD = 0.75
"""Share of the lease that a server waits; the rest is for its own looks and the workers' waits."""
LOOK_EVERY = 1.0
"""Wall seconds that a call may wait at the server, at most, before it is asked again."""
START_SECONDS = 120.0
"""Wall seconds that a process may take to start."""
TIDY_SECONDS = 2.0
"""Wall seconds for which a process that is about to end may tidy up."""
CALL_SECONDS = 30.0
"""Wall seconds after which an answer that need not wait counts as lost."""


class RayServer:
    """:class:`Server`'s methods, answered by an actor; it may be sent to other processes.

    A call whose answer is lost (the process died, the answer took too long) is made again for
    ``patience`` wall seconds: what has happened already does not happen twice, because a push
    carries its number and a registration a token.

    On the wire: a pull brings the parameters as encoded, a push takes the update as encoded, each
    through shared memory, which the sender writes once and the receiver reads in place; to another
    machine through Ray's, one transfer for all who read that version there. Everything else is a
    message of less than a kilobyte.

    Use :func:`ray_server` to make one.

    Attributes:
      name: Which server, for messages.
      actor: Ray's handle.
    """

    _near: bool

    def __init__(
        self,
        name: str,
        params: PyTree,
        rule: Rule,
        num_workers: int,
        *,
        push: Any = None,
        pull: Any = None,
        lease: float = math.inf,
        seed: int = 0,
        patience: float = 60.0,
        call_seconds: float = CALL_SECONDS,
        actor_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        params = jax.tree.map(np.asarray, params)
        own = {"push": push, "pull": pull, "seed": seed, **options}
        own["lease"] = LEASE_OF_SHARD * lease
        if "now" in options:
            raise ValueError("ray_server(now=...): its leases are in wall seconds, each process's.")
        # What a caller may have got wrong shows here, and not in another process.
        Server(params, rule, num_workers, **own).close()
        self.name, self.num_workers, self.now = name, num_workers, time.monotonic
        self.lease, self.patience, self.call_seconds = lease, patience, call_seconds
        push_codec, self._feedback = split_content(push, "push")
        pull_codec, _ = split_content(pull, "pull")
        self.push_format, self._pull_format = Format(params, push_codec), Format(params, pull_codec)
        self._seed = seed
        self._begin_here()
        ray = ray_in_session()
        chosen = {
            "num_cpus": 0,
            "max_restarts": -1,  # by Ray, empty; the run gives it its last state
            "max_task_retries": 0,
            # Two waiting calls of each worker, for one whose answer is lost is made again.
            "max_concurrency": 2 * num_workers + 16,
            **(actor_options or {}),
        }
        made = ray.remote(Shard).options(**chosen)
        self.actor = made.remote(self.push_format, rule, num_workers, own)
        # Not with the rest, which Ray keeps for as long as it may have to start the actor anew.
        self.actor.begin.remote(tuple(jax.tree.leaves(params)))

    def _call(
        self,
        method: str,
        *args: Any,
        seconds: float = 0.0,
        again: bool = True,
        read: Callable[[Any], Any] | None = None,
    ) -> Any:
        """An answer, as ``read``; ``seconds`` is what the server may take of its own accord."""
        ray = import_ray()
        errors = ray.exceptions
        end, pause = time.monotonic() + self.patience, 0.02
        while True:
            try:
                promised = getattr(self.actor, method).remote(*args)
                answer = ray.get(promised, timeout=seconds + self.call_seconds)
                return answer if read is None else read(answer)
            except errors.RayTaskError as error:
                if not isinstance(error.cause, NotRestored):
                    raise error.cause from None
                why = str(error.cause)
            except errors.GetTimeoutError:
                why = f"no answer within {seconds + self.call_seconds:g} s."
            except (errors.RayActorError, errors.ObjectLostError) as error:
                why = _first_line(error)
            except Stale:
                why = "what it laid out is gone."
            if time.monotonic() >= end or not again:
                raise Unreachable(f"{self.name} did not answer {method!r}: {why}")
            time.sleep(pause)
            pause = min(2 * pause, 0.5)

    def _ask(self, name: str, *args: Any) -> Any:
        return self._call("ask", name, *args)

    # What Server has.

    def register(self, worker: int, incarnation: int = 0) -> Registration:
        return self._call("register", worker, incarnation, uuid.uuid4().hex)

    def skip_to(self, worker: int, incarnation: int, clock: int) -> None:
        self._ask("skip_to", worker, incarnation, clock)

    def resume(self, worker: int) -> tuple[int, int] | None:
        return self._ask("resume", worker)

    def last_incarnation(self, worker: int) -> int:
        return self._ask("last_incarnation", worker)

    def heartbeat(self, worker: int, incarnation: int) -> None:
        self._call("heartbeat", worker, incarnation)

    def members(self) -> dict[int, MemberInfo]:
        return self._ask("members")

    def evict(self, worker: int, why: str = "evicted") -> None:
        self._ask("evict", worker, why)

    def expire(self) -> list[int]:
        return self._ask("expire")

    def close(self, why: str = "the run is over") -> None:
        self._ask("close", why)

    @property
    def version(self) -> int:
        return self._ask("version")

    @property
    def min_clock(self) -> int:
        return self._ask("min_clock")

    @property
    def params(self) -> PyTree:
        return self._ask("params")

    @property
    def apply_state(self) -> Any:
        return self._ask("apply_state")

    @property
    def staleness(self) -> Counter[int]:
        return self._ask("staleness")

    @property
    def traffic(self) -> Traffic:
        return self._ask("traffic")

    def clock(self, worker: int) -> int:
        return self._ask("clock", worker)

    def try_pull(
        self,
        worker: int,
        max_staleness: float | None = None,
        *,
        incarnation: int | None = None,
        clock: int | None = None,
    ) -> Snapshot | None:
        answer = self._pulled(worker, max_staleness, 0.0, incarnation, clock)
        return None if isinstance(answer, str) else answer

    def pull(
        self,
        worker: int,
        max_staleness: float | None = None,
        timeout: float | None = None,
        *,
        incarnation: int | None = None,
        clock: int | None = None,
    ) -> Snapshot:
        """As ``Server.pull``.

        It waits at the server for an eighth of the lease at a time: a worker that is frozen while
        it waits does not ask again, and loses its lease.
        """
        end = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            left = max(end - time.monotonic(), 0.0)
            answer = self._pulled(worker, max_staleness, self._slice(left), incarnation, clock)
            if not isinstance(answer, str):
                return answer
            if time.monotonic() >= end:
                _, _, why = answer.partition(": ")
                raise StaleTimeout(f"worker {worker} waited {timeout:g} s: {why}")

    def barrier(self, name: str, worker: int, timeout: float | None = None) -> None:
        """As ``Server.barrier``; not asked again where the answer is lost (`Unreachable`)."""
        end = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            seconds = self._slice(max(end - time.monotonic(), 0.0))
            why = self._call("barrier", name, worker, seconds, seconds=seconds, again=False)
            if not why:
                return
            if time.monotonic() >= end:
                raise StaleTimeout(re.sub(r"waited \S+ s", f"waited {timeout:g} s", why))

    def sender(self, worker: int) -> Sender:
        return Sender(self.push_format, self._feedback, self._seed, worker)

    def push(
        self, worker: int, incarnation: int, seq: int, update: PyTree, base_version: int
    ) -> Ack:
        if not isinstance(update, Parcel):
            if self.push_format.codec is not None:
                raise ValueError(
                    f"push: updates are encoded with {self.push_format.codec}; push what "
                    "server.sender(worker)(update, seq) returns."
                )
            update = self.push_format.encode(self.push_format.leaves(update, "push"))
        content, nbytes = update.content, update.nbytes
        if nbytes >= SHARED_FROM:
            if self._near and (laid := self._shelf.lay(content)):
                ticket, hold = laid  # held until the answer is there
                try:
                    return self._pushed(worker, incarnation, seq, ticket, nbytes, base_version)
                except (Elsewhere, Stale):
                    self._near = False
                finally:
                    del hold
            # In a list, Ray leaves it to the server to look for it, which is sooner.
            content = [import_ray().put(content)]
        return self._pushed(worker, incarnation, seq, content, nbytes, base_version)

    def _pushed(self, *args: Any) -> Ack:
        return self._call("push", *args)

    def snapshot(self) -> dict[str, Any]:
        return self._call("snapshot")

    def restore(self, state: dict[str, Any], *, fence: bool = False) -> None:
        """As ``Server.restore``; with ``fence``, who was a member then must register anew."""
        self._call("restore", state, fence)

    def place(self) -> tuple[str, int]:
        """Ray's name of its node, and the number of its process there."""
        return self._call("place", again=False)

    def stop(self) -> None:
        """Ends its process."""
        ray = import_ray()
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(self.actor.tidy.remote(), timeout=TIDY_SECONDS)
        ray.kill(self.actor)

    def __getstate__(self) -> dict[str, Any]:
        # What it lays out and has read is each process's own.
        own = {"_shelf", "_reader", "_here", "_near"}
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin_here()

    def _begin_here(self) -> None:
        self._here = machine(import_ray().get_runtime_context().get_node_id())
        self._shelf, self._reader = Shelf(self._here), Reader(self._here)
        self._near = True  # until the server says that it cannot read what is laid out here

    def _slice(self, left: float) -> float:
        return min(left, LOOK_EVERY, self.lease / 8)

    def _pulled(
        self,
        worker: int,
        max_staleness: float | None,
        seconds: float,
        incarnation: int | None,
        clock: int | None,
    ) -> Snapshot | str:
        asked = (worker, max_staleness, seconds, incarnation, clock, self._here)
        return self._call("pull", *asked, seconds=seconds, read=self._read)

    def _read(self, answer: Any) -> Snapshot | str:
        if isinstance(answer, str):
            return answer
        version, min_clock, nbytes, content = answer
        if isinstance(content, Ticket):
            content = self._reader.take(content)
        elif isinstance(content, list):
            content = import_ray().get(content[0], timeout=self.call_seconds)
        return Snapshot(version, min_clock, Parcel(content, nbytes), self._pull_format)


class ShardedRayServer(ShardedServer):
    """:class:`ShardedServer` over actors, which are asked at the same time."""

    servers: Any

    def __init__(
        self, params: PyTree, rule: Rule, num_workers: int, num_shards: int, **options: Any
    ) -> None:
        self._pool: ThreadPoolExecutor | None = None
        super().__init__(params, rule, num_workers, num_shards, **options)

    def _server(self, number: int, *args: Any, **options: Any) -> Any:
        return RayServer(f"server shard {number}", *args, **options)

    def _each(self, call: Any, *args: Any) -> list[Any]:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(len(self.servers))
        return list(self._pool.map(call, self.servers, *args))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pool": None}

    def stop(self) -> None:
        """Ends their processes."""
        for s in self.servers:
            s.stop()


def ray_server(
    params: PyTree, rule: Rule, num_workers: int, *, num_shards: int = 1, **options: Any
) -> Any:
    """A server in a process of its own, or several that share the parameters' bytes equally.

    Args:
      params: Pytree of arrays: the initial parameters.
      rule: As for :class:`Server`; it is sent to the process.
      num_workers: As for :class:`Server`.
      num_shards: Processes; as for :class:`ShardedServer` where there are several.
      options: ``push``, ``pull``, ``seed`` and ``on_applied`` (called in the server's process) as
        for :class:`Server`;

        - ``lease``: Wall seconds after which the others are freed from a worker of which nothing
          was heard. The server itself gives up after three quarters of it.
        - ``patience``: Wall seconds for which callers try to reach it; 60.
        - ``call_seconds``: Wall seconds after which an answer counts as lost; 30.
        - ``actor_options``: As for Ray's ``.options``, such as ``{"num_cpus": 1}``; by default it
          takes none of what Ray counts.

    Raises:
      ImportError: Ray is not installed.
      ValueError: as :class:`Server`; there is no Ray session.
    """
    if not isinstance(num_shards, int) or isinstance(num_shards, bool) or num_shards < 1:
        raise ValueError(f"ray_server(num_shards={num_shards!r}): expected an int >= 1.")
    ray_in_session()
    params = jax.tree.map(frozen, params)
    server: RayServer | ShardedRayServer
    if num_shards == 1:
        server = RayServer("the server", params, rule, num_workers, **options)
    else:
        server = ShardedRayServer(params, rule, num_workers, num_shards, **options)
    assert server.version == 0  # once all processes have started
    return server


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
