"""Workers of consensus ADMM, each with a model and a price of its own."""

from typing import Any, ClassVar

import jax

from jdml.communicate.pace.workers.base import (
    Compute,
    Pull,
    Push,
    Run,
    Task,
    Towards,
    Worker,
    tree_add,
)

PyTree = Any


class AdmmWorker(Worker):
    """``u <- u + x - z``; ``every`` steps on ``f(x) + rho/2 |x - z + u|^2``; pushes ``x + u``.

    For a server with :func:`async_admm`. It steps on from its own x, and x = z, u = 0 at first.

    Args:
      number: Which worker, below the number that the server starts with.
      task: What it computes; its ``step`` is given the penalty as ``towards``.
      every: Number >= 1 of local steps in a round.
      rho: The server's penalty.

    Reference: Zhang & Kwok, "Asynchronous Distributed ADMM for Consensus Optimization", 2014,
    algorithm 1.
    """

    def __init__(self, number: int, task: Task, every: int, rho: float) -> None:
        super().__init__(number, task)
        if every < 1 or not rho > 0:
            raise ValueError(
                f"AdmmWorker(every={every!r}, rho={rho!r}): expected every >= 1 and rho > 0."
            )
        self.every, self.rho = every, rho
        self.params: PyTree = None
        """x, the worker's own model."""
        self.dual: PyTree = None
        """u, the scaled dual variable."""

    remembered_models: ClassVar = ("params", "dual")

    def _towards(self, params: PyTree) -> Towards:
        return Towards(self.rho, params)

    def run(self) -> Run:
        while True:
            snapshot = yield Pull()
            z = snapshot.params
            if self.params is None:
                self.params, self.dual = z, jax.tree.map(lambda x: x * 0, z)
            dual = jax.tree.map(lambda u, x, z: u + x - z, self.dual, self.params, z)
            yield Compute(self.every)
            # Only now, for a computation that was broken off is begun again with another pull.
            self.dual, target = dual, tree_add(z, dual, -1.0)
            self.params, _ = self._local_steps(self.params, self.every, Towards(self.rho, target))
            yield Push(tree_add(self.params, self.dual), snapshot.version)
