"""What every source of batches is, and the iterator that places its batches on a mesh.

A source is a function ``(worker, step) -> batch``. It has no position, so that threads, processes
and compiled programs can share one: Hogwild's threads call it each for themselves
(``OptaxTask(loss_fn, tx, source)``), and workers in lock-step get what the same calls would give,
as global arrays.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jdml.partition.samples import check_state
from jdml.sharding import global_batch

Batch = Any


@runtime_checkable
class Source(Protocol):
    """Batches as a function of worker and step."""

    def __call__(self, worker: Any, step: Any) -> Batch:
        """The batch of worker's step, a pytree of arrays with the samples along dim 0."""

    def state(self) -> dict[str, Any]:
        """What a position is relative to: small, JSON."""


class PlacedBatches:
    """Endless global batches of a source: worker k's samples on the k-th place of the axis.

    Batch s is ``source(0, s), …, source(K-1, s)`` one after the other along dim 0, sharded over the
    worker axis and the same along the others. Each process makes its own workers' samples only.

    Made by a source's ``batches``.

    Attributes:
      step: Batches given out.
    """

    def __init__(
        self,
        source: Source,
        mesh: Mesh,
        workers: str | tuple[str, ...] = "data",
        make: Callable[[int], Batch] | None = None,
    ) -> None:
        self.source, self.mesh = source, mesh
        self.axes = check_axes(mesh, workers)
        self.num_workers = int(np.prod([mesh.shape[axis] for axis in self.axes]))
        self.step = 0
        self._make = make
        self._mine = _workers_here(mesh, self.axes)

    def batch_at(self, step: int) -> Batch:
        """Global batch ``step``; moves nothing."""
        if step < 0:
            raise ValueError(f"batches are counted from 0, got step {step}.")
        if self._make is not None:
            return self._make(step)
        parts = [self.source(k, step) for k in self._mine]
        local = jax.tree.map(lambda *xs: np.concatenate([np.asarray(x) for x in xs]), *parts)
        return global_batch(local, self.mesh, PartitionSpec(self.axes))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self.batch_at(self.step)
        self.step += 1
        return batch

    def state(self) -> dict[str, Any]:
        """The position, and all that it is relative to: JSON, the same on every process."""
        return {"step": self.step, "num_workers": self.num_workers, **self.source.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Moves to a saved position.

        Raises:
          ValueError: the state belongs to another source or number of workers; names each
            difference, and moves nothing.
        """
        self.step = check_state(
            state, self.state(), hint="Resume with the saved values, or start anew."
        )


def check_axes(mesh: Mesh, workers: str | tuple[str, ...]) -> tuple[str, ...]:
    """The worker axis or axes as a tuple.

    Raises:
      ValueError: the mesh has no such axis.
    """
    axes = (workers,) if isinstance(workers, str) else tuple(workers)
    missing = [axis for axis in axes if axis not in mesh.axis_names]
    if missing or not axes:
        raise ValueError(
            f"batches(workers={workers!r}): the mesh has the axes {list(mesh.axis_names)}; name "
            "one of them, or several."
        )
    return axes


def _workers_here(mesh: Mesh, axes: tuple[str, ...]) -> list[int]:
    """The workers of whom this process has a device, ascending."""
    here = np.array([d.process_index == jax.process_index() for d in mesh.devices.flat])
    places = np.stack(np.unravel_index(np.flatnonzero(here), mesh.devices.shape))
    of_axes = [places[mesh.axis_names.index(axis)] for axis in axes]
    sizes = tuple(mesh.shape[axis] for axis in axes)
    return np.unique(np.ravel_multi_index(of_axes, sizes)).tolist()
