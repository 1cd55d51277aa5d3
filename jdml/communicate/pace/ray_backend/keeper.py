"""Looks after a server's process: takes snapshots of it, and restores it when it was lost."""

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable
from typing import Any

from jdml.communicate.pace.ray_backend.errors import NotRestored, Unreachable
from jdml.communicate.pace.ray_backend.server import START_SECONDS, RayServer
from jdml.communicate.pace.ray_backend.session import import_ray

LOOK_EVERY = 0.1
"""Wall seconds between two questions whether it is there."""


class Keeper:
    """One server's. Nothing in here waits: what was asked is looked at when it has come.

    A server that was lost, or does not answer for ``frozen_after`` wall seconds and is therefore
    killed, is started anew by Ray and given the last snapshot: the updates that it had taken since
    are lost, and all its workers register anew.

    Args:
      server: Which.
      every: Wall seconds between two snapshots, which stay in this process's shared memory.
      frozen_after: Wall seconds after which one that does not answer counts as frozen.
      tell: ``(what, who, why)`` of what happens to it.
    """

    def __init__(
        self,
        server: RayServer,
        every: float,
        frozen_after: float,
        tell: Callable[[str, str, str], None],
    ) -> None:
        self._ray = import_ray()
        self._server, self._every, self._frozen_after = server, every, frozen_after
        self._tell = tell
        self.version = 0
        self.lost = False
        self.num_restored = 0
        self._state, self._place = server.snapshot(), server.place()
        now = time.monotonic()
        self._next_snapshot, self._next_question = now + every, now
        self._asked = math.inf
        self._question: Any = None
        self._snapshot: Any = None

    @property
    def awaited(self) -> list[Any]:
        """References on which to wait."""
        return [ref for ref in (self._question, self._snapshot) if ref is not None]

    def look(self) -> None:
        """Takes what has come, and asks again when it is time."""
        if self._question is not None and self._is_there(self._question):
            question, self._question = self._question, None
            self._take_answer(question)
        elif self._question is not None and time.monotonic() - self._asked > self._patience:
            self._lose(f"it has not answered for {self._patience:g} s, and was killed")
            self._question = None
            self._kill()
        if self._snapshot is not None and self._is_there(self._snapshot):
            snapshot, self._snapshot = self._snapshot, None
            with contextlib.suppress(self._ray.exceptions.RayError):  # the next question tells why
                self._state = self._ray.get(snapshot, timeout=self._server.call_seconds)
        now = time.monotonic()
        if self._question is None and now >= self._next_question:
            self._asked, self._next_question = now, now + LOOK_EVERY
            self._question = self._server.actor.ask.remote("version")
        if self._snapshot is None and now >= self._next_snapshot and not self.lost:
            self._next_snapshot = now + self._every
            self._snapshot = self._server.actor.snapshot.remote()

    @property
    def _patience(self) -> float:
        return max(self._frozen_after, START_SECONDS) if self.lost else self._frozen_after

    def _is_there(self, ref: Any) -> bool:
        return bool(self._ray.wait([ref], timeout=0)[0])

    def _take_answer(self, question: Any) -> None:
        errors = self._ray.exceptions
        try:
            self.version = self._ray.get(question, timeout=self._server.call_seconds)
            self.lost = False
        except errors.RayTaskError as error:
            if not isinstance(error.cause, NotRestored):
                raise error.cause from None
            self._lose("its process was lost")
            self._snapshot = None
            self._restore()
        except errors.RayError as error:
            self._lose(str(error).strip().splitlines()[0])

    def _lose(self, why: str) -> None:
        if not self.lost:
            self.lost = True
            self._tell("lost", self._server.name, why)

    def _kill(self) -> None:
        node, pid = self._place
        if node == self._ray.get_runtime_context().get_node_id():
            # Ray would first ask it to end, for five seconds.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        else:
            self._ray.kill(self._server.actor, no_restart=False)

    def _restore(self) -> None:
        try:
            restored = self._server.actor.restore.remote(self._state, True)
            self._ray.get(restored, timeout=self._server.call_seconds)
            self._place = self._server.place()
        except (self._ray.exceptions.RayError, Unreachable):
            return  # lost again; the next question will tell
        self.lost = False
        self.num_restored += 1
        version = self._state["version"]
        self._tell("restored", self._server.name, f"as it was at version {version}")
