"""Synchronous SGD: every worker takes the mean gradient, exact or compressed."""

from typing import Any, NamedTuple

import optax

from jdml.communicate import Wire
from jdml.communicate.collectives.all_reduce import Axis, Content, check_exchange
from jdml.communicate.exchange import exchange_mean, init_exchange

PyTree = Any


class MeanGradientsState(NamedTuple):
    """State of :func:`mean_gradients`.

    Attributes:
      residual: What the exchange keeps. With error feedback what is still owed, f32, shaped like
        the gradients; with a reducer its state; else ``()``.
    """

    residual: PyTree


def mean_gradients(
    axis: Axis,
    codec: Content = None,
    topology: str = "two_phase",
) -> optax.GradientTransformationExtraArgs:
    """Replaces each worker's gradient with the mean over the workers.

    ``g <- (1/K) sum_k g_k``, first in the chain: ``optax.chain(mean_gradients("data"),
    optax.adamw(...))``.

    Args:
      axis: The worker axis. ``update`` runs inside a ``shard_map`` in which it is manual.
      codec: ``None`` for the exact mean; ``int8()``; ``error_feedback(int8())``.
      topology: See :func:`jdml.communicate.all_reduce_mean`, which also gives the bytes sent.

    State kept: with error feedback one f32 residual per worker, of the gradients' size; else none.

    Raises:
      ValueError: ``codec`` or ``topology`` is not one.

    Reference: Chen et al., "Revisiting Distributed Synchronous SGD", 2016.
    """
    check_exchange("mean_gradients", axis, codec, topology)

    def init(params: PyTree) -> MeanGradientsState:
        return MeanGradientsState(init_exchange(codec, params))

    def update(
        updates: PyTree,
        state: MeanGradientsState,
        params: PyTree | None = None,
        *,
        wire: Wire | None = None,
        **extra: Any,
    ) -> tuple[PyTree, MeanGradientsState]:
        del params, extra
        mean, residual = exchange_mean(updates, state.residual, axis, codec, topology, wire)
        return mean, MeanGradientsState(residual)

    return optax.GradientTransformationExtraArgs(init, update)
