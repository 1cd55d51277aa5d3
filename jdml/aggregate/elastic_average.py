"""Elastic averaging: workers tied by springs to a centre that follows their mean."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jdml.communicate import Wire
from jdml.communicate.branch import choose, first_branch
from jdml.communicate.collectives.all_reduce import Axis, Content, check_exchange
from jdml.communicate.exchange import exchange_mean, init_exchange
from jdml.communicate.frequency import check_every
from jdml.communicate.wire import settle

PyTree = Any


class ElasticAverageState(NamedTuple):
    """State of :func:`elastic_average`.

    Attributes:
      steps: int32, local steps taken.
      center: The centre variable, the same on every worker.
      residual: What the exchange keeps; ``()`` if nothing.
      metrics: Whether the workers exchanged in the last step; ``{}`` if they always do.
    """

    steps: jax.Array
    center: PyTree
    residual: PyTree
    metrics: dict[str, jax.Array]


def elastic_average(
    axis: Axis,
    every: int,
    alpha: float,
    codec: Content = None,
    topology: str = "two_phase",
) -> optax.GradientTransformationExtraArgs:
    """Pulls workers and centre towards each other at every ``every``-th step; last in the chain.

    With ``c`` the centre, and both differences taken before the step: ``x_k <- x_k + u_k -
    alpha (x_k - c)``, ``c <- c + alpha sum_k (x_k - c)``. After ``optax.sgd(lr)`` this is EASGD;
    after ``optax.sgd(lr, momentum, nesterov=True)``, EAMSGD. The workers explore around the
    centre, which is the answer (``optax.tree.get(state.opt_state, "center")``).

    Args:
      axis: The worker axis. ``update`` runs inside a ``shard_map`` in which it is manual.
      every: Number tau >= 1 of steps between exchanges.
      alpha: Elasticity, in (0, 1); the paper takes ``0.9 / K`` for K workers.
      codec: ``None`` for the exact mean, a codec, or ``error_feedback(codec)``: of the workers'
        distances from the centre. A worker's own pull is exact in any case.
      topology: See :func:`jdml.communicate.all_reduce_mean`; the same bytes, once in ``every``
        steps.

    State kept: the workers' own models; one more copy of the parameters, shared; with error
    feedback an f32 residual per worker.

    Raises:
      ValueError: an argument is out of its range; when traced: ``alpha`` times the number of
        workers is 2 or more, where the centre swings ever farther.

    Reference: Zhang, Choromanska & LeCun, "Deep Learning with Elastic Averaging SGD", 2015.
    """
    check_every("elastic_average", every, schedules=False)
    if not (math.isfinite(alpha) and 0 < alpha < 1):
        raise ValueError(
            f"elastic_average(alpha={alpha!r}): expected 0 < alpha < 1, such as 0.9 / K."
        )
    check_exchange("elastic_average", axis, codec, topology)

    def init(params: PyTree) -> ElasticAverageState:
        return ElasticAverageState(
            steps=jnp.zeros((), jnp.int32),
            center=jax.tree.map(jnp.copy, params),  # the parameters' own buffers are donated
            residual=init_exchange(codec, params),
            metrics={} if every == 1 else first_branch("elastic_average"),
        )

    def update(
        updates: PyTree,
        state: ElasticAverageState,
        params: PyTree | None = None,
        *,
        wire: Wire | None = None,
        **extra: Any,
    ) -> tuple[PyTree, ElasticAverageState]:
        del extra
        if params is None:
            raise ValueError(
                "elastic_average needs the parameters: call tx.update(updates, state, params)."
            )
        num_workers = jax.lax.axis_size(axis)
        if alpha * num_workers >= 2:
            raise ValueError(
                f"elastic_average: alpha={alpha} with {num_workers} workers on axis {axis!r}; the "
                f"centre is unstable from alpha = 2 / {num_workers} on. The paper takes "
                f"0.9 / {num_workers} = {0.9 / num_workers:.3g}."
            )

        moved = optax.apply_updates(params, updates)

        def exchange() -> tuple[PyTree, PyTree, PyTree, PyTree]:
            apart = jax.tree.map(
                lambda x, c: x.astype(jnp.float32) - c.astype(jnp.float32), params, state.center
            )
            mean, residual = exchange_mean(apart, state.residual, axis, codec, topology, wire)
            moves = jax.tree.map(lambda u, d: (u - alpha * d).astype(u.dtype), updates, apart)
            center = jax.tree.map(
                lambda c, d: (c + alpha * num_workers * d).astype(c.dtype), state.center, mean
            )
            pulled = jax.tree.map(lambda y, d: (y - alpha * d).astype(y.dtype), moved, apart)
            return moves, pulled, center, residual

        def alone() -> tuple[PyTree, PyTree, PyTree, PyTree]:
            return updates, moved, state.center, state.residual

        steps: jax.Array = optax.safe_increment(state.steps)
        if every == 1:
            result, metrics = exchange(), dict[str, jax.Array]()
        else:
            due = state.steps % every == 0
            result, metrics = choose("elastic_average", due, (alone, exchange))
        moves, moved, center, residual = result
        settle(wire, moves, moved)
        return moves, ElasticAverageState(steps, center, residual, metrics)

    return optax.GradientTransformationExtraArgs(init, update)
