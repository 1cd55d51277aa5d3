"""Workers that read the server's model, step from it, and say how far they came."""

from typing import Any, ClassVar

from jdml.communicate.pace.workers.base import Compute, Pull, Push, Run, Task, Worker, tree_add

PyTree = Any


class SgdWorker(Worker):
    """Pulls every ``fetch_every`` steps, pushes the sum of its updates every ``push_every``.

    Both 1: asynchronous (or synchronous) SGD. Both H: local SGD, whose pushes are ``w_H - w_0``.
    Different: Downpour SGD's asymmetric push and pull; between two pulls the worker goes on from
    its own model.

    What is pushed is what the task's chain gives: steps for :func:`add` and :func:`average`,
    :func:`delayed_nesterov`; gradients (``optax.identity()``) for :func:`dc_asgd` and
    :func:`optimise`, which need ``fetch_every=1``, because a worker must not step uphill.

    Args:
      number: Which worker.
      task: What it computes.
      push_every: Number n_push >= 1 of local steps.
      fetch_every: Number n_fetch >= 1 of local steps; ``None``: as ``push_every``.
      pipelined: Whether it goes on computing while its update travels. It may then read before its
        own last update is in.
      max_staleness: Of every pull, besides the server's bound.

    Raises:
      ValueError: an interval is no int >= 1.

    Bytes per local step: an update / n_push up, the parameters / n_fetch down, as encoded.

    Reference: Dean et al., "Large Scale Distributed Deep Networks", 2012, section 4.1; Stich,
    "Local SGD converges fast and communicates little", 2019.
    """

    def __init__(
        self,
        number: int,
        task: Task,
        push_every: int = 1,
        fetch_every: int | None = None,
        *,
        pipelined: bool = False,
        max_staleness: float | None = None,
    ) -> None:
        super().__init__(number, task)
        self.push_every = push_every
        self.fetch_every = push_every if fetch_every is None else fetch_every
        self.pipelined, self.max_staleness = pipelined, max_staleness
        for name in ("push_every", "fetch_every"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"SgdWorker({name}={value!r}): expected an int >= 1.")

        self.params: PyTree = None
        """The model that it steps from; ``None`` where it must read one."""
        self.summed: PyTree = None
        """Updates not pushed yet."""
        self.num_summed = 0
        """How many."""
        self.version: Any = None
        """The version that it read last."""
        self.base: Any = None
        """The version that the first of them was computed on."""

    remembered: ClassVar = (*Worker.remembered, "num_summed", "version", "base")
    remembered_models: ClassVar = ("params", "summed")

    def lose_unsent(self) -> None:
        self.params = self.summed = self.version = self.base = None
        self.num_summed = 0

    def run(self) -> Run:
        while True:
            if self.params is None:
                snapshot = yield Pull(self.max_staleness)
                self.params, self.version = snapshot.params, snapshot.version
            if self.num_summed == 0:
                self.summed, self.base = None, self.version
            count = min(
                self.fetch_every - self.num_steps % self.fetch_every,
                self.push_every - self.num_summed,
            )
            yield Compute(count)
            reads_next = (self.num_steps + count) % self.fetch_every == 0
            params, update = self._local_steps(self.params, count, goes_on=not reads_next)
            self.params = None if reads_next else params
            self.summed = update if self.summed is None else tree_add(self.summed, update)
            self.num_summed += count
            if self.num_summed == self.push_every:
                push = Push(self.summed, self.base, wait=not self.pipelined)
                self.summed, self.num_summed = None, 0
                yield push
