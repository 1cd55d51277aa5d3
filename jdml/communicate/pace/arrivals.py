"""Models of when workers' answers arrive in a lockstep program: simulated time, drawn from a key.

Each factory returns ``(key, step, num_workers) -> f32 [num_workers]``, the same on every worker for
the same key. The unit of time is the caller's.
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

Arrivals = Callable[[jax.Array, jax.Array, int], jax.Array]
"""``(key, step, num_workers) -> f32 [num_workers]``; ``inf`` for an answer that never arrives."""


def log_normal(
    sigma: float, median: float = 1.0, slower: Mapping[int, float] | None = None
) -> Arrivals:
    """``median * exp(sigma n)`` with n standard normal: the usual jitter of a shared machine.

    Args:
      sigma: At least 0; 0 makes all arrive at once.
      median: Greater than 0.
      slower: Workers that take a multiple of their time: ``{worker: factor}``.
    """
    if not (sigma >= 0 and median > 0):
        raise ValueError(f"log_normal({sigma}, {median}): expected sigma >= 0 and median > 0.")
    return _scaled(lambda key, n: median * jnp.exp(sigma * jax.random.normal(key, (n,))), slower)


def heavy_tailed(
    shape: float, least: float = 1.0, slower: Mapping[int, float] | None = None
) -> Arrivals:
    """Pareto: ``P(time > t) = (least / t)^shape``, for stragglers that take many times as long.

    Args:
      shape: Greater than 0; up to 1 the mean is infinite, up to 2 the variance.
      least: Shortest time, greater than 0.
      slower: As in :func:`log_normal`.
    """
    if not (shape > 0 and least > 0):
        raise ValueError(f"heavy_tailed({shape}, {least}): expected shape > 0 and least > 0.")
    return _scaled(
        lambda key, n: least * jnp.exp(jax.random.exponential(key, (n,)) / shape), slower
    )


def masked(mask: np.ndarray) -> Arrivals:
    """What a caller recorded or chose: those marked arrive at once, the others never.

    Args:
      mask: bool ``[num_steps, num_workers]``; step t uses row ``t mod num_steps``.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.dtype != np.bool_ or mask.shape[0] == 0:
        raise ValueError(
            f"masked: expected a bool array [num_steps, num_workers], got {mask.dtype}"
            f"{list(mask.shape)}."
        )

    def arrivals(key: jax.Array, step: jax.Array, num_workers: int) -> jax.Array:
        del key
        if mask.shape[1] != num_workers:
            raise ValueError(
                f"masked: {mask.shape[1]} columns, but there are {num_workers} workers."
            )
        times = jnp.asarray(np.where(mask, 0, math.inf), jnp.float32)
        return times[step % mask.shape[0]]

    return arrivals


def _scaled(
    draw: Callable[[jax.Array, int], jax.Array], slower: Mapping[int, float] | None
) -> Arrivals:
    slower = dict(slower or {})
    for worker, factor in slower.items():
        if not (worker >= 0 and factor > 0):
            raise ValueError(
                f"slower={{{worker}: {factor}}}: expected {{worker >= 0: factor > 0}}."
            )

    def arrivals(key: jax.Array, step: jax.Array, num_workers: int) -> jax.Array:
        if any(worker >= num_workers for worker in slower):
            raise ValueError(f"slower={slower} names a worker beyond the {num_workers} there are.")
        factors = np.ones(num_workers, np.float32)
        for worker, factor in slower.items():
            factors[worker] = factor
        return draw(jax.random.fold_in(key, step), num_workers) * factors

    return arrivals
