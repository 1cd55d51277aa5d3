"""A server in a process of its own: what Ray makes an actor of."""

import ctypes
import math
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from jdml.communicate.pace.errors import Evicted, StaleTimeout
from jdml.communicate.pace.messages import Ack, Registration
from jdml.communicate.pace.payload import Format, Leaves, Parcel
from jdml.communicate.pace.ray_backend.errors import NotRestored
from jdml.communicate.pace.ray_backend.session import import_ray
from jdml.communicate.pace.ray_backend.shelf import Reader, Shelf, Ticket, machine
from jdml.communicate.pace.rules.base import Rule
from jdml.communicate.pace.server import Server

SHARED_FROM = 1 << 20
"""Bytes from which on a version is put into shared memory once, for all who read it."""
CHECKS_PER_LEASE = 16
GET_SECONDS = 30.0
"""Wall seconds for what lies in shared memory, or on another node."""


class Shard:
    """Answers for a :class:`Server`, from several threads at once.

    Nothing waits for long in here, so that whoever died, or was frozen, while it waited is noticed:
    a pull that cannot be answered within the seconds that it brings says so, and is asked again.

    It begins with parameters, or where its process was lost, with a state; until then it refuses
    all calls. From a state on it refuses the incarnations that were registered then, whose later
    pushes are lost, until they register anew.
    """

    def __init__(
        self, params_format: Format, rule: Rule, num_workers: int, options: dict[str, Any]
    ) -> None:
        jax.config.update("jax_platforms", "cpu")
        _keep_freed_memory()
        self._ray = import_ray()
        self._format = params_format
        self._made_with = (rule, num_workers, options)
        self._server: Server | None = None
        self._registered: dict[tuple[int, int], str] = {}
        self._fenced: dict[int, int] = {}
        self._publishing = threading.Lock()
        here = machine(self.place()[0])
        self._shelf, self._reader, self._here = Shelf(here), Reader(here), here
        # Of the version that was asked for last: where it is, for readers on this machine or not.
        self._published: tuple[Parcel | None, dict[bool, Any]] = (None, {})
        self._last_read = -1
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="publishing")

    def begin(self, leaves: Leaves) -> None:
        """Starts with these parameters, unless it has started."""
        if self._server is None:
            self._server = self._made(leaves)

    def ask(self, name: str, *args: Any) -> Any:
        """Value of an attribute of the server, or answer of a method that never waits."""
        value = getattr(self._open(), name)
        return value(*args) if callable(value) else value

    def heartbeat(self, worker: int, incarnation: int) -> None:
        self._open(worker, incarnation).heartbeat(worker, incarnation)

    def register(self, worker: int, incarnation: int, token: str) -> Registration:
        """As ``Server.register``; a call that comes again with its token is answered again."""
        server = self._open(worker, incarnation)
        if self._registered.get((worker, incarnation)) == token:
            server.heartbeat(worker, incarnation)
            return Registration(server.clock(worker), server.version)
        registration = server.register(worker, incarnation)
        self._registered[worker, incarnation] = token
        return registration

    def pull(
        self,
        worker: int,
        max_staleness: float | None,
        seconds: float,
        incarnation: int | None,
        clock: int | None,
        reader: str,
    ) -> tuple[int, int, int, Any] | str:
        """``(version, min_clock, nbytes, content)``, or why it cannot be answered yet.

        Content of 1 MiB and more is a ticket, for a ``reader`` on this machine, or else a reference
        to Ray's shared memory, in a list; every reader of that version reads the same bytes.
        """
        server = self._open(worker, incarnation)
        try:
            snapshot = server.pull(
                worker, max_staleness, seconds, incarnation=incarnation, clock=clock
            )
        except StaleTimeout as error:
            return str(error)
        parcel, self._last_read = snapshot.parcel, snapshot.version
        return (
            snapshot.version,
            snapshot.min_clock,
            parcel.nbytes,
            self._shared(parcel, reader == self._here),
        )

    def push(
        self,
        worker: int,
        incarnation: int,
        seq: int,
        content: Any,
        nbytes: int,
        base_version: int,
    ) -> Ack:
        """As ``Server.push``; large content, a ticket or a reference in a list, is not copied.

        Where the version before was read, this one is put into shared memory before it is asked
        for.

        Raises:
          Elsewhere: the ticket is of another machine.
          Stale: what it stands for is gone.
        """
        server = self._open(worker, incarnation)
        if isinstance(content, Ticket):
            content = self._reader.take(content)
        elif isinstance(content, list):
            content = self._ray.get(content[0], timeout=GET_SECONDS)
        was_read = self._last_read == server.version
        ack = server.push(worker, incarnation, seq, Parcel(content, nbytes), base_version)
        if was_read and ack.version > base_version:
            self._ahead.submit(self._publish, server)
        return ack

    def _publish(self, server: Server) -> None:
        parcel = server.published().parcel
        for near in tuple(self._published[1]):
            self._shared(parcel, near)

    def snapshot(self) -> dict[str, Any]:
        """As ``Server.snapshot``, in NumPy."""
        state = self._open().snapshot()
        state["apply"] = jax.tree.map(on_host, state["apply"])
        return state

    def barrier(self, name: str, worker: int, seconds: float) -> str:
        """Empty once the barrier is over; else who is missing."""
        try:
            self._open().barrier(name, worker, seconds)
        except StaleTimeout as error:
            return str(error)
        return ""

    def restore(self, state: dict[str, Any], fence: bool) -> None:
        """As ``Server.restore``; ``fence`` makes all members register anew."""
        server = self._made(state["leaves"]) if self._server is None else self._server
        server.restore(state)
        self._registered = {}
        self._fenced = {}
        if fence:
            self._fenced = {w: m.incarnation for w, m in server.members().items()}
        self._server = server

    def tidy(self) -> None:
        """Removes what it laid out: it is about to end."""
        self._shelf.close()

    def place(self) -> tuple[str, int]:
        """Ray's name of the node, and the number of this process."""
        return self._ray.get_runtime_context().get_node_id(), os.getpid()

    def _open(self, worker: int | None = None, incarnation: int | None = None) -> Server:
        if self._server is None:
            raise NotRestored("its process is new and waits for its last state.")
        if worker is not None and incarnation is not None:
            fenced = self._fenced.get(worker)
            if fenced is not None and incarnation <= fenced:
                raise Evicted(
                    f"worker {worker} (incarnation {incarnation}): its server was lost and "
                    "restored from a snapshot; register as a newer incarnation."
                )
        return self._server

    def _shared(self, parcel: Parcel, near: bool) -> Any:
        if parcel.nbytes < SHARED_FROM:
            return parcel.content
        with self._publishing:
            if self._published[0] is not parcel:
                self._published = (parcel, {})
            places = self._published[1]
            if near not in places:
                laid = self._shelf.lay(parcel.content) if near else None
                places[near] = laid or ([self._ray.put(parcel.content)], None)
            return places[near][0]

    def _made(self, leaves: Leaves) -> Server:
        rule, num_workers, options = self._made_with
        # New versions are written where they will be read.
        options = {"room": self._shelf.room} | options
        server = Server(self._format.tree(leaves), rule, num_workers, **options)
        if server.lease < math.inf:
            threading.Thread(target=_look_after_leases, args=(server,), daemon=True).start()
        return server


def _keep_freed_memory() -> None:
    """Lets a version use the memory of the one before it, where the C library is glibc.

    It would give large arrays back to the system, which then clears every page anew: a third of the
    time in which an update of 50 MB is added.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        return
    arena_max, mmap_max, trim_threshold = -8, -4, -1
    library.mallopt(arena_max, 1)
    library.mallopt(mmap_max, 0)
    library.mallopt(trim_threshold, 1 << 30)


def _look_after_leases(server: Server) -> None:
    while True:
        time.sleep(server.lease / CHECKS_PER_LEASE)
        server.expire()


def on_host(x: Any) -> Any:
    """NumPy, of JAX's arrays that have such a form."""
    if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return x
    return np.asarray(x) if isinstance(x, jax.Array) else x
