"""Synchronous SGD: every worker takes the mean gradient, exact or compressed."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jdml.communicate import Wire, all_reduce_mean, on_shards
from jdml.communicate.codecs import Codec
from jdml.communicate.collectives.all_reduce import check_exchange
from jdml.communicate.error_feedback import ErrorFeedback

PyTree = Any


class MeanGradientsState(NamedTuple):
    """``residual``: what error feedback still owes, f32, shaped like the gradients; else ``()``."""

    residual: PyTree


def mean_gradients(
    axis: str,
    codec: Codec | ErrorFeedback | None = None,
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
    feedback = isinstance(codec, ErrorFeedback)

    def init(params: PyTree) -> MeanGradientsState:
        return MeanGradientsState(zeros_f32(params) if feedback else ())

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


def exchange_mean(
    tree: PyTree,
    residual: PyTree,
    axis: str,
    codec: Codec | ErrorFeedback | None,
    topology: str,
    wire: Wire | None,
) -> tuple[PyTree, PyTree]:
    """``all_reduce_mean`` on local shards; returns the mean and the residual (``()`` if none)."""
    key = None if wire is None else wire.key
    extras = () if key is None else (key,)
    if isinstance(codec, ErrorFeedback):

        def with_feedback(x: PyTree, e: PyTree, *key: jax.Array) -> tuple[PyTree, PyTree]:
            return all_reduce_mean(
                x, axis, codec, topology, key=key[0] if key else None, residual=e
            )

        mean, residual = on_shards(with_feedback, wire, (tree, residual), extras, num_outputs=2)
        return mean, residual

    def without(x: PyTree, *key: jax.Array) -> tuple[PyTree]:
        return (all_reduce_mean(x, axis, codec, topology, key=key[0] if key else None),)

    (mean,) = on_shards(without, wire, (tree,), extras)
    return mean, ()


def zeros_f32(params: PyTree) -> PyTree:
    """A first residual: f32, shaped and placed like ``params``."""
    return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.float32), params)
