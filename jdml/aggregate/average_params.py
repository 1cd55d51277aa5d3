"""Local SGD and its relatives: train alone for a while, then average the models."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jdml.communicate import Wire
from jdml.communicate.branch import choose, first_branch
from jdml.communicate.collectives.all_reduce import Axis, Content, check_exchange
from jdml.communicate.exchange import exchange_mean, init_exchange
from jdml.communicate.frequency import Every, check_every, is_due
from jdml.communicate.wire import settle

PyTree = Any


class AverageParamsState(NamedTuple):
    """State of :func:`average_params`.

    Attributes:
      steps: int32, local steps taken.
      last: int32, ``steps`` as it was at the last exchange.
      anchor: The parameters after the last round, the same on every worker; ``()`` when the plain
        exact mean needs none.
      outer: State of the outer optimiser, the same on every worker; ``()`` without one.
      residual: What error feedback still owes, per worker; ``()`` without it.
      metrics: Whether the workers exchanged after the last step; ``{}`` if they always do.
    """

    steps: jax.Array
    last: jax.Array
    anchor: PyTree
    outer: Any
    residual: PyTree
    metrics: dict[str, jax.Array]


class _Round(NamedTuple):
    """What a step makes of the workers' models: the moves, and where they lead."""

    moves: PyTree
    params: PyTree
    anchor: PyTree
    outer: Any
    residual: PyTree


def average_params(
    axis: Axis,
    every: Every,
    outer: optax.GradientTransformation | None = None,
    codec: Content = None,
    topology: str = "two_phase",
) -> optax.GradientTransformationExtraArgs:
    """Averages the workers' models after every ``every`` local steps; last in the chain.

    Local SGD: ``x_k <- x_k + u_k``; after H steps ``x_k <- mean_j x_j``. With an outer optimiser
    (DiLoCo) or a codec, the workers exchange how far they moved from the common anchor ``a``, which
    is small and compresses well: ``d = mean_k (a - x_k)``, ``a <- a + outer(d)``, ``x_k <- a``
    (without ``outer``: ``a <- a - d``). H = 1 with plain SGD is synchronous SGD.

    Args:
      axis: The worker axis. ``update`` runs inside a ``shard_map`` in which it is manual.
      every: Number H >= 1 of local steps per round, or a function of the steps taken that gives it
        (``post_local(...)``).
      outer: Optax optimiser for the anchor, fed ``d`` as its gradient.
      codec: ``None`` for the exact mean, a codec, or ``error_feedback(codec)``.
      topology: See :func:`jdml.communicate.all_reduce_mean`; the same bytes, once in ``every``
      steps.

    State kept: the workers' own models; with ``outer`` or ``codec`` one more copy of the
    parameters and the outer optimiser's state (for momentum, another copy), shared; with error
    feedback an f32 residual per worker.

    Raises:
      ValueError: ``every`` is neither a function nor an int >= 1; ``codec`` or ``topology`` is
        unknown.

    Reference: Stich, "Local SGD Converges Fast and Communicates Little", ICLR 2019; Douillard et
    al., "DiLoCo", 2023 (``outer=optax.sgd(0.7, momentum=0.9, nesterov=True)``, ``every=500``).
    """
    check_every("average_params", every)
    check_exchange("average_params", axis, codec, topology)
    anchored = outer is not None or codec is not None
    optimizer = None if outer is None else optax.with_extra_args_support(outer)

    def init(params: PyTree) -> AverageParamsState:
        return AverageParamsState(
            steps=jnp.zeros((), jnp.int32),
            last=jnp.zeros((), jnp.int32),
            # A copy: the parameters' own buffers are donated.
            anchor=jax.tree.map(jnp.copy, params) if anchored else (),
            outer=() if optimizer is None else optimizer.init(params),
            residual=init_exchange(codec, params),
            metrics={} if every == 1 else first_branch("average_params"),
        )

    def update(
        updates: PyTree,
        state: AverageParamsState,
        params: PyTree | None = None,
        *,
        wire: Wire | None = None,
        **extra: Any,
    ) -> tuple[PyTree, AverageParamsState]:
        if params is None:
            raise ValueError(
                "average_params needs the parameters: call tx.update(updates, state, params)."
            )
        steps: jax.Array = optax.safe_increment(state.steps)

        moved = optax.apply_updates(params, updates)

        def exchange() -> _Round:
            if not anchored:
                mean, _ = exchange_mean(moved, (), axis, None, topology, wire)
                return _Round(_difference(mean, params, updates), mean, (), (), ())
            distance = jax.tree.map(jnp.subtract, state.anchor, moved)
            mean, residual = exchange_mean(distance, state.residual, axis, codec, topology, wire)
            if optimizer is None:
                step, outer_state = jax.tree.map(jnp.negative, mean), ()
            else:
                step, outer_state = optimizer.update(
                    mean, state.outer, state.anchor, wire=wire, **extra
                )
            anchor = optax.apply_updates(state.anchor, step)
            moves = _difference(anchor, params, updates)
            return _Round(moves, anchor, anchor, outer_state, residual)

        def alone() -> _Round:
            return _Round(updates, moved, state.anchor, state.outer, state.residual)

        if every == 1:
            done, last, metrics = exchange(), steps, dict[str, jax.Array]()
        else:
            due = is_due(every, steps, state.last)
            done, metrics = choose("average_params", due, (alone, exchange))
            last = jnp.where(due, steps, state.last)
        settle(wire, done.moves, done.params)
        return done.moves, AverageParamsState(
            steps, last, done.anchor, done.outer, done.residual, metrics
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _difference(new: PyTree, old: PyTree, like: PyTree) -> PyTree:
    return jax.tree.map(lambda y, x, u: (y - x).astype(u.dtype), new, old, like)
