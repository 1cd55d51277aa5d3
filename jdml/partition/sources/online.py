"""Online data: fresh samples from the true distribution, drawn where they are used, for ever."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jdml.partition.sources.base import Batch, PlacedBatches, check_axes

_LARGEST = 2**32


class Online:
    """``batch = draw(key)``, ``key = fold_in(fold_in(key(seed), worker), step)``.

    No two workers, and no two steps of one, get the same key; the same (seed, worker, step) gives
    the same samples on any number of workers, in a thread of Hogwild, on the mesh and inside a
    step of your own (``source(jax.lax.axis_index("data"), step)`` in a ``shard_map``). Nothing is
    kept, and nothing is copied from the host.

    Args:
      draw: A function of a key alone that returns one worker's batch: a pytree of arrays with the
        samples along dim 0, such as :func:`gaussian_logistic` makes. It is traced.
      seed: ``0 <= seed < 2**32``.

    Raises:
      ValueError: the seed is out of its range.
    """

    def __init__(self, draw: Callable[[jax.Array], Batch], seed: int = 0) -> None:
        if not 0 <= seed < _LARGEST:
            raise ValueError(f"Online(seed={seed}): expected 0 .. 2**32 - 1.")
        self.draw, self.seed = draw, int(seed)
        self._drawn = jax.jit(self._draw)

    def __call__(self, worker: Any, step: Any) -> Batch:
        """The samples of that worker's step; both are ints >= 0, or traced ones.

        Raises:
          ValueError: a Python int below 0, or of 2**32 and more.
        """
        for name, value in (("worker", worker), ("step", step)):
            if isinstance(value, (int, np.integer)) and not 0 <= value < _LARGEST:
                raise ValueError(f"Online: {name} {value}; expected 0 .. 2**32 - 1.")
        return self._drawn(_unsigned(worker), _unsigned(step))

    def batches(self, mesh: Mesh, workers: str | tuple[str, ...] = "data") -> PlacedBatches:
        """An endless iterator of global batches, each worker's part drawn on its own devices.

        Args:
          mesh: Its other axes all hold the same.
          workers: The worker axis or axes.
        """
        axes = check_axes(mesh, workers)

        @jax.jit
        @functools.partial(
            jax.shard_map, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(axes)
        )
        def drawn(step: jax.Array) -> Batch:
            return self._draw(jax.lax.axis_index(axes), step)

        return PlacedBatches(self, mesh, workers, make=lambda step: drawn(_unsigned(step)))

    def state(self) -> dict[str, Any]:
        """What a position is relative to."""
        return {"source": "online", "seed": self.seed}

    def _draw(self, worker: Any, step: Any) -> Batch:
        key = jax.random.key(np.uint32(self.seed))
        return self.draw(jax.random.fold_in(jax.random.fold_in(key, worker), step))


def _unsigned(value: Any) -> Any:
    return np.uint32(value) if isinstance(value, (int, np.integer)) else value
