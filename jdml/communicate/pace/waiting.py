"""How callers of the server wait: in Python, never inside a compiled program."""

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from jdml.communicate.pace.errors import Evicted
from jdml.communicate.pace.members import Member, Members


class _Host(Protocol):
    """What waiting needs of a server."""

    now: Callable[[], float]

    @property
    def lease(self) -> float: ...

    def expire(self) -> list[int]: ...

    def find_member(self, worker: int) -> Member: ...


class Waiting:
    """Waits for changes that are announced on a condition, whose lock the caller holds."""

    def __init__(self, changed: threading.Condition, host: _Host) -> None:
        self._changed, self._host = changed, host

    def until(self, worker: int, done: Callable[[], bool], timeout: float | None) -> bool:
        """Looks at ``done()`` after every change; ``False`` if ``timeout`` wall seconds passed."""
        end = math.inf if timeout is None else time.monotonic() + timeout
        while not done():
            left = end - time.monotonic()
            if left <= 0:
                return False
            # Somebody must look after the leases; who waits has the time.
            longest = min(left, self._host.lease / 4)
            with self._not_silent(worker):
                self._changed.wait(None if longest == math.inf else longest)
            self._host.expire()
        return True

    @contextmanager
    def _not_silent(self, worker: int) -> Iterator[None]:
        member = self._host.find_member(worker)
        member.waiting += 1
        try:
            yield
        finally:
            member.waiting -= 1
            member.last_seen = self._host.now()


def who_is_awaited(worker: int, members: Members, num_registered: int, num_workers: int) -> str:
    """Why a pull was not answered, for a message."""
    missing = num_workers - num_registered
    if missing > 0:
        return f"{missing} of {num_workers} workers have not registered."
    try:
        clock = members.find(worker).clock
    except Evicted as error:
        return str(error)
    behind = sorted(w for w, m in members.live() if m.clock == members.min_clock)
    return (
        f"it is at clock {clock}, and {len(behind)} of {members.num_live} workers are at the "
        f"least, {members.min_clock}: {behind[:8]}."
    )
