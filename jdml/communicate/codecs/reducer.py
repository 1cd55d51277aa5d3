"""The contract of a reducer: a mean taken in a compressed space of its own, leaf by leaf.

Where a codec encodes rows and any collective carries them, a reducer decides itself what the
workers exchange (PowerSGD: two thin factors of each matrix). It is used in a codec's place, keeps
state from round to round, and feeds back its own error.
"""

import abc
from typing import Any

import jax

PyTree = Any


class Reducer(abc.ABC):
    """Takes means over a worker axis. Subclasses are frozen dataclasses (hashable, comparable)."""

    needs_key: bool = False
    """Whether a round draws random numbers."""

    @abc.abstractmethod
    def init(self, tree: PyTree) -> Any:
        """The first round's state, a ``NamedTuple``, for trees like ``tree`` (whole leaves).

        What is still owed from round to round stands in a field called ``residual``.
        """

    @abc.abstractmethod
    def reduce_mean(
        self, tree: PyTree, state: Any, axis: str | tuple[str, ...], key: jax.Array | None = None
    ) -> tuple[PyTree, Any]:
        """``(mean, new state)``; inside a ``shard_map`` in which ``axis`` is manual.

        Args:
          tree: Float arrays: whole leaves, of which other mesh axes may automatically hold shards.
          state: From :meth:`init` or the last round.
          axis: The worker axis or axes.
          key: PRNG key, the same on every worker.
        """

    @abc.abstractmethod
    def alone(self, tree: PyTree, state: Any) -> tuple[PyTree, Any]:
        """``(what the mean would be, new state)`` of a lone worker, without a collective.

        It says nothing, so it leaves nothing out, and what it still owed is paid.
        """
