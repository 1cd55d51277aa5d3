"""A worker as a generator of requests, so that any backend can drive it.

``run()`` yields what the worker wants next, and is sent the answer: a :class:`Pull` is answered by
a ``Snapshot``, a :class:`Compute` by ``None`` when the time for it has passed (the work itself is
done by the generator then), a :class:`Push` by an ``Ack`` or, with ``wait=False``, by ``None`` at
once. Threads answer by calling the server and waiting; virtual time answers when the simulated
clock says so. A worker knows neither.
"""

import abc
from collections.abc import Generator
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

PyTree = Any


class Pull(NamedTuple):
    """Wants the parameters; ``max_staleness`` as in ``Server.pull``."""

    max_staleness: float | None = None


class Compute(NamedTuple):
    """Takes the time of so many local steps."""

    num_steps: int


class Push(NamedTuple):
    """Sends an update that was computed on ``base_version``.

    With ``wait=False`` the worker goes on while it travels: one buffer is sent, the other filled.
    A second push waits until the first has come.
    """

    update: PyTree
    base_version: Any
    wait: bool = True


Run = Generator[Pull | Compute | Push, Any, None]


class Towards(NamedTuple):
    """A term ``rho/2 |x - centre|^2`` to be added to the loss."""

    rho: float
    centre: PyTree


class Task(Protocol):
    """What the workers compute: one local step."""

    def init(self, worker: int, params: PyTree) -> Any:
        """The worker's own state (of its optimiser) at the first parameters that it reads."""

    def step(
        self, worker: int, params: PyTree, state: Any, index: int, towards: Towards | None = None
    ) -> tuple[PyTree, Any, Any]:
        """``(update to be added to params, new state, loss)`` of the worker's step ``index``."""


class Worker(abc.ABC):
    """One of the workers; what it remembers stands in its attributes.

    Attributes:
      number: Which, an int >= 0.
      task: What it computes.
      num_steps: Local steps taken.
      loss: What the last of them returned.
    """

    def __init__(self, number: int, task: Task) -> None:
        self.number, self.task = number, task
        self.num_steps = 0
        self.loss: Any = None
        self._state: Any = None
        self._begun = False

    @abc.abstractmethod
    def run(self) -> Run:
        """The requests, without end. Called again for a worker that was started anew."""

    def _local_steps(
        self, params: PyTree, count: int, towards: Towards | None = None, *, goes_on: bool = True
    ) -> Any:
        """``(params after the steps, sum of the updates)``; without ``goes_on`` before the last."""
        if not self._begun:
            self._state, self._begun = self.task.init(self.number, params), True
        summed: PyTree = None
        for i in range(count):
            update, self._state, self.loss = self.task.step(
                self.number, params, self._state, self.num_steps, towards
            )
            self.num_steps += 1
            if goes_on or i < count - 1:
                params = tree_add(params, update)
            summed = update if summed is None else tree_add(summed, update)
        return params, summed


def tree_add(x: PyTree, y: PyTree, scale: float = 1.0) -> PyTree:
    """``x + scale * y``, leaf by leaf, in the dtypes of ``x``."""
    if scale == 1:
        return jax.tree.map(lambda a, b: _as(a + b, a), x, y)
    return jax.tree.map(lambda a, b: _as(a + scale * b, a), x, y)


def _as(value: Any, like: Any) -> Any:
    return np.asarray(value, like.dtype) if isinstance(like, np.ndarray) else value
