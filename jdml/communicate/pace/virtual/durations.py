"""How long each local step of each worker takes, drawn in blocks from a model of the clocks."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdml.communicate.pace.arrivals import Arrivals

BLOCK = 64


class Durations:
    """Virtual seconds of step ``n`` of worker ``k``: row n, column k of what the model draws.

    Args:
      clocks: An :data:`Arrivals` (in virtual seconds), or a recorded trace: floats ``[num_steps,
        num_workers]``, of which step t uses row ``t mod num_steps``.
      num_workers: How many columns there must be.
      seed: Of the draws.

    Raises:
      ValueError: another shape, or a time that is negative or NaN.
    """

    def __init__(self, clocks: Arrivals | np.ndarray, num_workers: int, seed: int) -> None:
        self._num_workers = num_workers
        self._blocks: dict[int, list[list[float]]] = {}
        if callable(clocks):
            model, key = clocks, jax.random.key(seed)
            self._draw: Any = lambda start: _block(model, num_workers, key, start)
            return
        trace = np.asarray(clocks, np.float64)
        if trace.ndim != 2 or trace.shape[1] != num_workers or trace.shape[0] == 0:
            raise ValueError(
                f"clocks: expected floats [num_steps, {num_workers}], one column per worker, got "
                f"shape {list(trace.shape)}."
            )
        self._draw = lambda start: trace[np.arange(start, start + BLOCK) % len(trace)]

    def __call__(self, worker: int, step: int) -> float:
        number, row = divmod(step, BLOCK)
        block = self._blocks.get(number)
        if block is None:
            block = self._blocks[number] = self._drawn(number)
        return block[row][worker]

    def total(self, worker: int, start: int, count: int) -> float:
        """Of ``count`` steps from ``start`` on."""
        if count == 1:
            return self(worker, start)
        return sum(self(worker, start + i) for i in range(count))

    def _drawn(self, number: int) -> list[list[float]]:
        times = np.asarray(self._draw(number * BLOCK), np.float64)
        if times.shape != (BLOCK, self._num_workers) or not (times >= 0).all():
            raise ValueError(
                f"clocks: expected times >= 0 for {self._num_workers} workers, got shape "
                f"{list(times.shape[1:])}, least {times.min()}."
            )
        return times.tolist()


@functools.partial(jax.jit, static_argnums=(0, 1))
def _block(model: Arrivals, num_workers: int, key: jax.Array, start: Any) -> jax.Array:
    """``[BLOCK, num_workers]``, compiled once for all runs with one model."""
    steps = start + jnp.arange(BLOCK)
    return jax.vmap(lambda step: model(key, step, num_workers))(steps)
