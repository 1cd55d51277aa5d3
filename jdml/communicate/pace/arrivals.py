"""Models of how long workers take for an answer: simulated time, drawn from a key.

Each factory returns ``(key, step, num_workers) -> f32 [num_workers]``, the same on every worker for
the same key. The unit of time is the caller's.
"""

import math
from collections.abc import Callable, Iterable, Mapping

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


def constant(time: float = 1.0, slower: Mapping[int, float] | None = None) -> Arrivals:
    """Always the same time, > 0; ``slower`` as in :func:`log_normal`."""
    return log_normal(0.0, time, slower)


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


def pausing(arrivals: Arrivals, probability: Mapping[int, float], pause: float) -> Arrivals:
    """Workers that stop now and then: ``pause`` more, at random steps.

    Args:
      arrivals: Their times otherwise.
      probability: Of a pause at a step: ``{worker: probability}``, in [0, 1].
      pause: How long, > 0.
    """
    probability = dict(probability)
    if not pause > 0 or not all(k >= 0 and 0 <= p <= 1 for k, p in probability.items()):
        raise ValueError(
            f"pausing({probability}, {pause}): expected {{worker >= 0: 0 <= probability <= 1}} and "
            "a pause > 0."
        )

    def draw(key: jax.Array, step: jax.Array, num_workers: int) -> jax.Array:
        _check_workers("pausing", probability, num_workers)
        chances = np.zeros(num_workers, np.float32)
        for worker, chance in probability.items():
            chances[worker] = chance
        own = jax.random.fold_in(jax.random.fold_in(key, 1), step)
        pauses = jax.random.uniform(own, (num_workers,)) < chances
        return arrivals(key, step, num_workers) + jnp.where(pauses, pause, 0.0)

    return draw


def by_worker(arrivals: Arrivals, others: Mapping[int, Arrivals]) -> Arrivals:
    """A model for each worker: ``others`` for those that it names, ``arrivals`` for the rest."""
    others = dict(others)

    def draw(key: jax.Array, step: jax.Array, num_workers: int) -> jax.Array:
        _check_workers("by_worker", others, num_workers)
        times = arrivals(key, step, num_workers)
        for worker, own in others.items():
            times = times.at[worker].set(own(key, step, num_workers)[worker])
        return times

    return draw


def recorded(times: np.ndarray) -> Arrivals:
    """Times that were measured: row t of ``[num_steps, num_workers]`` for step t, and over again.

    Args:
      times: Floats >= 0; ``inf`` for an answer that never arrives.
    """
    trace = np.asarray(times, np.float32)
    if trace.ndim != 2 or trace.shape[0] == 0 or not (trace >= 0).all():
        raise ValueError(
            f"recorded: expected times >= 0 as [num_steps, num_workers], got shape "
            f"{list(trace.shape)}."
        )

    def arrivals(key: jax.Array, step: jax.Array, num_workers: int) -> jax.Array:
        del key
        if trace.shape[1] != num_workers:
            raise ValueError(
                f"recorded: {trace.shape[1]} columns, but there are {num_workers} workers."
            )
        return jnp.asarray(trace)[step % trace.shape[0]]

    return arrivals


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
        _check_workers("slower", slower, num_workers)
        factors = np.ones(num_workers, np.float32)
        for worker, factor in slower.items():
            factors[worker] = factor
        return draw(jax.random.fold_in(key, step), num_workers) * factors

    return arrivals


def _check_workers(name: str, workers: Iterable[int], num_workers: int) -> None:
    beyond = sorted(worker for worker in workers if worker >= num_workers)
    if beyond:
        raise ValueError(f"{name} names workers {beyond}, beyond the {num_workers} there are.")
