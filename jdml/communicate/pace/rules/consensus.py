"""Asynchronous consensus ADMM: the agreed model from everyone's last report."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jdml.communicate.pace.messages import Arrival
from jdml.communicate.pace.payload import Leaves, frozen
from jdml.communicate.pace.rules.arithmetic import check_rate, total
from jdml.communicate.pace.rules.base import Apply, Book, Rule
from jdml.communicate.pace.rules.partial_barrier import partial_barrier

PyTree = Any
Proximal = Callable[[PyTree, Any], PyTree]
"""``prox(tree, step) -> tree``; those of ``jdml.aggregate`` serve."""


@dataclasses.dataclass(frozen=True)
class Consensus(Apply):
    """See :func:`async_admm`."""

    rho: float
    prox: Proximal | None

    def init(self, leaves: Leaves, book: Book) -> tuple[Leaves, ...]:
        return (leaves,) * book.num_workers

    def resized(self, state: Any, leaves: Leaves, num_workers: int) -> tuple[Leaves, ...]:
        kept = tuple(state[:num_workers])
        return kept + (leaves,) * (num_workers - len(kept))

    def check_worker(self, worker: int, num_workers: int) -> None:
        if not 0 <= worker < num_workers:
            raise ValueError(
                f"worker {worker}: consensus ADMM was set up for workers 0 to {num_workers - 1}, "
                "each with a term of its own in the sum."
            )

    def __call__(
        self, leaves: Leaves, state: Any, batch: Sequence[Arrival], book: Book
    ) -> tuple[Leaves, Any]:
        reports = list(state)
        for arrival in batch:
            reports[arrival.worker] = arrival.leaves
        mean: Sequence[Any] = [x / len(reports) for x in total(reports)]
        if self.prox is not None:
            tree = book.format.tree(tuple(mean))
            mean = jax.tree.leaves(self.prox(tree, 1 / (len(reports) * self.rho)))
        new = tuple(
            frozen(np.asarray(m).astype(z.dtype)) for m, z in zip(mean, leaves, strict=True)
        )
        return new, tuple(reports)


def async_admm(
    num_reports: int, max_age: int, rho: float = 1.0, prox: Proximal | None = None
) -> Rule:
    """``z <- prox_{g/(N rho)}(mean_k v_k)`` once S of N workers have reported, none older than τ.

    ``v_k = x_k + u_k`` is the last that worker k pushed (:class:`AdmmWorker`), the initial
    parameters until then. With S = N, or τ = 1, this is synchronous consensus ADMM.

    Args:
      num_reports: S, in ``1 <= S <= N``.
      max_age: τ >= 1 rounds: no report is used in more than that many.
      rho: Penalty > 0, the workers' too.
      prox: Proximal operator of the penalty g on z; ``None``: g = 0.

    Kept at the server: the last report of every worker, N copies of the parameters.

    Raises:
      ValueError: an argument is out of its range; at the server: S > N.

    Reference: Zhang & Kwok, "Asynchronous Distributed ADMM for Consensus Optimization", 2014,
    algorithm 2; Boyd et al. 2011, section 7.1.
    """
    check_rate("async_admm: rho", rho)
    return Rule(partial_barrier(num_reports, max_age), Consensus(rho, prox))
