"""Workers of elastic averaging, each with a model of its own."""

from typing import Any, ClassVar

import jax

from jdml.communicate.pace.workers.base import Compute, Pull, Push, Run, Task, Worker, tree_add

PyTree = Any


class ElasticWorker(Worker):
    """Every ``every`` local steps: ``d = x - c; x <- x - alpha d``, and pushes ``d``.

    With :func:`elastic_centre` of the same alpha at the server the centre moves by ``+alpha d``.

    Args:
      number: Which worker.
      task: What it computes.
      every: Number tau >= 1 of local steps between exchanges.
      alpha: Elasticity, in (0, 1).

    Reference: Zhang, Choromanska & LeCun, "Deep Learning with Elastic Averaging SGD", 2015.
    """

    def __init__(self, number: int, task: Task, every: int, alpha: float) -> None:
        super().__init__(number, task)
        if every < 1 or not 0 < alpha < 1:
            raise ValueError(
                f"ElasticWorker(every={every!r}, alpha={alpha!r}): expected every >= 1 and 0 < "
                "alpha < 1."
            )
        self.every, self.alpha = every, alpha
        self.params: PyTree = None
        """The worker's own model."""
        self.exchanged = False
        """Whether local steps are next."""

    remembered: ClassVar = (*Worker.remembered, "exchanged")
    remembered_models: ClassVar = ("params",)

    def run(self) -> Run:
        while True:
            if not self.exchanged:
                snapshot = yield Pull()
                centre = snapshot.params
                if self.params is None:
                    self.params = centre
                apart = jax.tree.map(lambda x, c: x - c, self.params, centre)
                yield Push(apart, snapshot.version)
                self.params = tree_add(self.params, apart, -self.alpha)
                self.exchanged = True
            yield Compute(self.every)
            self.params, _ = self._local_steps(self.params, self.every)
            self.exchanged = False
