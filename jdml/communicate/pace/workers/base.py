"""A worker as a generator of requests, so that any backend can drive it.

``run()`` yields what the worker wants next, and is sent the answer: a :class:`Pull` is answered by
a ``Snapshot``, a :class:`Compute` by ``None`` when the time for it has passed (the work itself is
done by the generator then), a :class:`Push` by an ``Ack`` or, with ``wait=False``, by ``None`` at
once. Threads answer by calling the server and waiting; virtual time answers when the simulated
clock says so. A worker knows neither.
"""

import abc
import copy
from collections.abc import Generator
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

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
    """What the workers compute: one local step, which hangs on its arguments alone.

    A step may be taken and forgotten (:meth:`Worker.rehearse`), or taken again by a worker that was
    started anew. The parameters are the server's own: read-only, and not to be donated.
    """

    def init(self, worker: int, params: PyTree) -> Any:
        """The worker's own state (of its optimiser) at the first parameters that it reads."""

    def step(
        self, worker: int, params: PyTree, state: Any, index: int, towards: Towards | None = None
    ) -> tuple[PyTree, Any, Any]:
        """``(update to be added to params, new state, loss)`` of the worker's step ``index``."""


@runtime_checkable
class RememberingTask(Protocol):
    """A task that keeps something besides what it is handed, such as a sampler's position.

    It is saved with the worker. One that draws a sample from ``(worker, index)`` needs none of it.
    """

    def state(self, worker: int) -> Any:
        """What it keeps for that worker: a pytree of arrays and numbers."""

    def load_state(self, worker: int, state: Any) -> None:
        """Goes on from what :meth:`state` returned."""


class Worker(abc.ABC):
    """One of the workers; what it remembers stands in its attributes.

    Attributes:
      number: Which, an int >= 0.
      task: What it computes.
      num_steps: Local steps taken.
      loss: What the last of them returned.
      residual: What error feedback owed when its last run ended: leaves like the parameters', or
        ``None``.
    """

    remembered: ClassVar[tuple[str, ...]] = ("num_steps", "loss", "residual")
    """Attributes that :meth:`state` saves: numbers, arrays, and plain containers of them."""
    remembered_models: ClassVar[tuple[str, ...]] = ()
    """The same of trees like the parameters, and ``None``."""

    def __init__(self, number: int, task: Task) -> None:
        self.number, self.task = number, task
        self.num_steps = 0
        self.loss: Any = None
        self._state: Any = None
        self._begun = False
        self.residual: Any = None

    @abc.abstractmethod
    def run(self) -> Run:
        """The requests, without end, from where its attributes say that it is."""

    def lose_unsent(self) -> None:  # noqa: B027
        """Forgets what a newer incarnation cannot send, for an older one began it."""

    def state(self) -> dict[str, Any]:
        """All that it remembers, as plain data: containers, numbers and arrays.

        Nothing is copied, and no later step changes it.
        """
        state = {name: getattr(self, name) for name in self.remembered}
        for name in self.remembered_models:
            state[name] = _flat(getattr(self, name))
        state["task_state"] = _flat(self._state) if self._begun else None
        if isinstance(self.task, RememberingTask):
            state["task"] = _flat(self.task.state(self.number))
        return state

    def load_state(self, state: dict[str, Any], params: PyTree) -> None:
        """Goes on from what :meth:`state` of such a worker returned.

        Args:
          state: Of a worker of this class, with such a task.
          params: A tree like the parameters; its values do not matter.

        Raises:
          ValueError: another kind of worker, or trees with another number of leaves.
        """
        expected = set(self.state())
        if set(state) != expected:
            raise ValueError(
                f"load_state: worker {self.number} was saved as another kind of worker, with "
                f"{sorted(set(state) - expected)} besides and without "
                f"{sorted(expected - set(state))}; expected a {type(self).__name__}."
            )
        for name in self.remembered:
            setattr(self, name, state[name])
        for name in self.remembered_models:
            setattr(self, name, _unflat(name, state[name], params))
        self._begun = state["task_state"] is not None
        if self._begun:
            like = self.task.init(self.number, params)
            self._state = _unflat("task_state", state["task_state"], like)
        if isinstance(self.task, RememberingTask):
            like = self.task.state(self.number)
            self.task.load_state(self.number, _unflat("task", state["task"], like))

    def rehearse(self, params: PyTree) -> PyTree:
        """Two local steps that leave no trace, so that all is compiled; the update."""
        before = self.task.state(self.number) if isinstance(self.task, RememberingTask) else None
        _, update = copy.copy(self)._local_steps(params, 2, self._towards(params))
        if isinstance(self.task, RememberingTask):
            self.task.load_state(self.number, before)
        return jax.block_until_ready(update)

    def _towards(self, params: PyTree) -> Towards | None:
        """A term of the kind that its local steps are given."""
        return None

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


def _flat(tree: PyTree) -> list[Any] | None:
    return None if tree is None else jax.tree.leaves(tree)


def _unflat(name: str, leaves: list[Any] | None, like: PyTree) -> PyTree:
    if leaves is None:
        return None
    structure: Any = jax.tree.structure(like)
    if structure.num_leaves != len(leaves):
        raise ValueError(
            f"load_state: {name!r} was saved with {len(leaves)} leaves, and {structure.num_leaves} "
            "are expected: another task or optimiser."
        )
    return jax.tree.unflatten(structure, leaves)


def _as(value: Any, like: Any) -> Any:
    return np.asarray(value, like.dtype) if isinstance(like, np.ndarray) else value
