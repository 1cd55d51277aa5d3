"""The whole of a run as plain data: the server, its clock, and every worker.

Taken between two runs, when no worker's thread is alive and nothing is on its way.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jdml.communicate.pace.payload import Leaves
from jdml.communicate.pace.sharded import AnyServer
from jdml.communicate.pace.virtual.clock import VirtualClock, VirtualSeconds
from jdml.communicate.pace.workers.base import Worker


def whole_state(server: AnyServer, workers: Sequence[Worker]) -> dict[str, Any]:
    """Containers, numbers and arrays from which :func:`load_whole_state` makes the same run."""
    now = server.now
    return {
        "server": server.snapshot(),
        "virtual_seconds": float(now.virtual_seconds) if isinstance(now, VirtualClock) else None,
        "workers": {worker.number: worker.state() for worker in workers},
    }


def load_whole_state(
    server: AnyServer, workers: Sequence[Worker], state: Mapping[str, Any]
) -> None:
    """Makes server and workers what others were at :func:`whole_state`.

    With the same workers, bit for bit. With others, by their numbers:

    - a worker that was there goes on from its own state, at its clock;
    - one that was not begins without any, at the least clock of the others;
    - one that was there and is not any more is evicted: nobody waits for it, what it had pushed
      counts, what it had computed and not pushed is lost;
    - what error feedback owes is kept: with the workers of either run in the order of their
      numbers, the j-th of M takes over the sum of the k-th's for all k with ``k mod M = j``.

    Args:
      server: With the same model and rule; it may start with another number of workers.
      workers: Those that will run.
      state: From :func:`whole_state`.

    Raises:
      ValueError: another model, rule or kind of worker; says what differs.
    """
    saved: dict[int, dict[str, Any]] = state["workers"]
    server.restore(state["server"])
    if isinstance(server.now, VirtualClock) and state["virtual_seconds"] is not None:
        server.now.virtual_seconds = VirtualSeconds(state["virtual_seconds"])
    params = server.params
    for worker in workers:
        if worker.number in saved:
            worker.load_state(saved[worker.number], params)
    numbers = sorted(worker.number for worker in workers)
    if numbers == sorted(saved):
        return
    for number in sorted(set(saved) - set(numbers)):
        server.evict(number, "it is not among the workers that the run was resumed with")
    owed = [saved[number]["residual"] for number in sorted(saved)]
    for j, worker in enumerate(sorted(workers, key=lambda worker: worker.number)):
        worker.residual = _sum(owed[j :: len(numbers)])


def _sum(residuals: Sequence[Leaves | None]) -> Leaves | None:
    """Leaf by leaf; in f32, or what is wider."""
    present = [r for r in residuals if r is not None]
    if len(present) < 2:
        return present[0] if present else None
    out = []
    for leaves in zip(*present, strict=True):
        wide = np.result_type(leaves[0].dtype, np.float32)
        out.append(np.sum([x.astype(wide) for x in leaves], axis=0).astype(leaves[0].dtype))
    return tuple(out)
