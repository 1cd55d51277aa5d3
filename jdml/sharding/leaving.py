"""A process that fails leaves at once, so that the others can notice.

When a process ends, JAX waits for all others to end too (300 s by default). After an uncaught
exception that is a deadlock: the others wait for this one in a collective, and this one, still
sending heartbeats, for them. A failed process therefore skips that wait, but for two seconds in
which those that fail for the same reason have their say: JAX aborts them when process 0 is gone.
"""

import atexit
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable
from types import TracebackType

_codes: list[int] = []  # exit codes of failures noted so far, of this process


def note_failure(code: int) -> None:
    """Have this process leave with ``code`` without waiting for others, once it ends."""
    if code:
        _codes.append(code)


def leave_at_once_on_failure(farewell: Callable[[], object]) -> None:
    """From now on an uncaught exception ends the process without waiting; call once.

    Args:
      farewell: called just before a failed process leaves; what it raises is ignored.
    """
    before = sys.excepthook

    def hook(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        before(kind, error, traceback)
        note_failure(128 + signal.SIGINT if issubclass(kind, KeyboardInterrupt) else 1)

    sys.excepthook = hook
    # Exit functions run last registered first: those of loggers and checkpointers made after
    # this still run, JAX's own, registered when it was imported, does not.
    atexit.register(_leave, farewell)


def _leave(farewell: Callable[[], object]) -> None:
    if _codes:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        with contextlib.suppress(Exception):
            farewell()
        os._exit(_codes[0])
