"""Backup workers: take the mean over those who are early, and drop the rest."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jdml.communicate import Wire, per_worker
from jdml.communicate.codecs.reducer import Reducer
from jdml.communicate.collectives.all_reduce import Axis, Content, check_exchange
from jdml.communicate.error_feedback import ErrorFeedback
from jdml.communicate.exchange import exchange_mean, init_exchange
from jdml.communicate.pace import Arrivals

PyTree = Any


class BackupWorkersState(NamedTuple):
    """State of :func:`backup_workers`.

    Attributes:
      steps: int32, steps taken.
      residual: What the exchange keeps; ``()`` if nothing.
      metrics: f32 scalars of the last step: ``backup_arrived``, how many gradients the mean is
        over, and ``backup_time``, when the last of them arrived (simulated time).
    """

    steps: jax.Array
    residual: PyTree
    metrics: dict[str, jax.Array]


def backup_workers(
    axis: Axis,
    num_backups: int,
    arrivals: Arrivals,
    codec: Content = None,
    topology: str = "two_phase",
) -> optax.GradientTransformationExtraArgs:
    """Replaces the gradients with the mean over the first ``K = N - b`` of N workers to arrive.

    ``g <- (1/K) sum_{k among the first K} g_k``; first in the chain. In lockstep SPMD all N
    gradients are there at once: who would have been late is what ``arrivals`` says, from a model of
    the workers' clocks or from a caller's own mask (0 where a gradient counts, ``inf`` where it
    does not). Where fewer than K arrive at all, the mean is over those; where none does, the
    gradient is zero.

    Args:
      axis: The worker axis, of N workers.
      num_backups: b, in ``0 <= b < N``; 0 is synchronous SGD.
      arrivals: ``(key, step, num_workers) -> times``, see
        :mod:`jdml.communicate.pace.arrivals`. Ties go to the worker
        of the lower number.
      codec: ``None`` for the exact mean, a codec, or ``error_feedback(codec)``; a late worker's
        residual waits for its next step.
      topology: See :func:`jdml.communicate.all_reduce_mean`, which also gives the bytes sent.

    State kept: with error feedback one f32 residual per worker; else counters.

    Raises:
      ValueError: ``num_backups`` is not an int >= 0; when traced: it is not below the number of
        workers; the arrival times have another shape; the codec cannot leave a worker out.

    Reference: Chen et al., "Revisiting Distributed Synchronous SGD", 2016, section 3.
    """
    if not isinstance(num_backups, int) or isinstance(num_backups, bool) or num_backups < 0:
        raise ValueError(
            f"backup_workers(num_backups={num_backups!r}): expected an int >= 0, how many of the "
            "workers may be late."
        )
    check_exchange("backup_workers", axis, codec, topology)
    if isinstance(codec, Reducer):
        raise ValueError(
            f"backup_workers: {codec} takes means in a space of its own and cannot leave a worker "
            "out. Use a codec such as int8(), or error_feedback(int8())."
        )

    def init(params: PyTree) -> BackupWorkersState:
        zero = jnp.zeros((), jnp.float32)
        return BackupWorkersState(
            steps=jnp.zeros((), jnp.int32),
            residual=init_exchange(codec, params),
            metrics={"backup_arrived": zero, "backup_time": zero},
        )

    def update(
        updates: PyTree,
        state: BackupWorkersState,
        params: PyTree | None = None,
        *,
        wire: Wire | None = None,
        **extra: Any,
    ) -> tuple[PyTree, BackupWorkersState]:
        del params, extra
        num_workers = jax.lax.axis_size(axis)
        if num_backups >= num_workers:
            raise ValueError(
                f"backup_workers: num_backups={num_backups}, but axis {axis!r} has {num_workers} "
                f"workers; at most {num_workers - 1} of them can be spared."
            )
        key = jax.random.key(0) if wire is None or wire.key is None else wire.key
        key = jax.random.fold_in(key, 1)  # not the one that the codec draws from
        times = jnp.asarray(arrivals(key, state.steps, num_workers), jnp.float32)
        if times.shape != (num_workers,):
            raise ValueError(
                f"backup_workers: arrivals returned shape {times.shape}; expected "
                f"({num_workers},), one time for each worker on axis {axis!r}."
            )
        order = jnp.argsort(times, stable=True)
        rank = jnp.zeros(num_workers, jnp.int32).at[order].set(jnp.arange(num_workers))
        early = (rank < num_workers - num_backups) & jnp.isfinite(times)
        num_early = jnp.sum(early)
        mine = early[jax.lax.axis_index(axis)]

        # The mean over all of what the early ones have, rescaled to a mean over the early ones.
        share = jax.tree.map(lambda g: jnp.where(mine, g, jnp.zeros_like(g)), updates)
        kept = state.residual
        if isinstance(codec, ErrorFeedback):
            # A late worker takes part with p = x + e = 0, so that it says nothing.
            kept = jax.tree.map(lambda e: jnp.where(mine, e, 0), per_worker(kept, axis))
        mean, residual = exchange_mean(share, kept, axis, codec, topology, wire)
        scale = num_workers / jnp.maximum(num_early, 1)
        mean = jax.tree.map(lambda g: (g * scale).astype(g.dtype), mean)
        if isinstance(codec, ErrorFeedback):
            # It still owns a chunk of the mean, whose error it keeps beside its own old debt.
            residual = jax.tree.map(
                lambda new, old: jnp.where(mine, new, new + old), residual, state.residual
            )
        metrics = {
            "backup_arrived": num_early.astype(jnp.float32),
            "backup_time": jnp.max(jnp.where(early, times, 0)),
        }
        steps: jax.Array = optax.safe_increment(state.steps)
        return mean, BackupWorkersState(steps, residual, metrics)

    return optax.GradientTransformationExtraArgs(init, update)
