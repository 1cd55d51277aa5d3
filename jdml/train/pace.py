"""Save and resume a run whose workers do not run in lockstep, as a whole.

Server, clocks and workers, with what error feedback owes and what tasks remember, become one
checkpoint of a :class:`Checkpointer`: in the background, atomic, verified.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from jdml.communicate.pace.sharded import AnyServer
from jdml.communicate.pace.whole import load_whole_state, whole_state
from jdml.communicate.pace.workers.base import Worker
from jdml.train.checkpoint import Checkpointer
from jdml.train.saving.pack import pack, unpack

_ARRAYS = "pace"


def save_run(
    checkpointer: Checkpointer, server: AnyServer, workers: Sequence[Worker], *, wait: bool = False
) -> int:
    """Saves a run between two calls of ``simulate`` or ``run_threads``; the step is the version.

    What it saves: the server's parameters, version, clocks, members, updates that are held and the
    rule's state; for each worker its counters (from which its samples are drawn), its optimiser's
    state, its model and what it has not pushed, and what error feedback owes; virtual time.

    Args:
      checkpointer: For this run and nothing else.
      server: Whose version must have grown since the last save.
      workers: Those that ran.
      wait: Return when it is on disk.

    Raises:
      ValueError: nothing has changed since the last save, or a task's state is no arrays.
      OSError: as ``Checkpointer.save``.
    """
    outline, data = pack(whole_state(server, workers))
    version = server.version
    checkpointer.save(version, {_ARRAYS: jnp.asarray(data)}, outline, wait=wait)
    return version


def load_run(
    checkpointer: Checkpointer,
    server: AnyServer,
    workers: Sequence[Worker],
    step: int | None = None,
) -> int:
    """Goes on from a checkpoint; the version at which it was saved.

    On the same workers the run is what it was, bit for bit, and what follows is what would have
    followed wherever that does not hang on computations that were under way: under the synchronous
    pace, without a network. Elsewhere a worker that was computing on an older version reads the
    newest when it begins again, and messages that were on their way are lost. What becomes of a run
    on other workers is said in :func:`load_whole_state`.

    Args:
      checkpointer: The folder.
      server: A new one with the same model and rule.
      workers: New ones of the same kind.
      step: A version that was saved; the newest that verifies by default.

    Raises:
      ValueError: another model, rule or kind of worker.
      OSError: no such checkpoint, or none that verifies.
    """
    restored = checkpointer.restore(None, step)
    if set(restored.state) != {_ARRAYS}:
        raise ValueError(
            f"{checkpointer.folder} holds checkpoints of another kind, with leaves "
            f"{sorted(restored.state)[:8]}; expected those of save_run."
        )
    state = unpack(restored.data, np.asarray(restored.state[_ARRAYS]))
    load_whole_state(server, workers, state)
    return restored.step
