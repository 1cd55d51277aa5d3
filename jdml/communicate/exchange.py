"""A mean over the workers as a transformation takes it: with its state, on the local shards."""

from typing import Any

import jax
import jax.numpy as jnp

from jdml.communicate.codecs.reducer import Reducer
from jdml.communicate.collectives.all_reduce import Axis, Content, all_reduce_mean
from jdml.communicate.error_feedback import ErrorFeedback
from jdml.communicate.wire import Wire, on_shards

PyTree = Any


def init_exchange(codec: Content, params: PyTree) -> PyTree:
    """What :func:`exchange_mean` keeps from round to round; ``()`` for what keeps nothing.

    With error feedback: zeros, f32, shaped and placed like ``params``.
    """
    if isinstance(codec, Reducer):
        return codec.init(params)
    if isinstance(codec, ErrorFeedback):
        return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.float32), params)
    return ()


def exchange_mean(
    tree: PyTree, state: PyTree, axis: Axis, codec: Content, topology: str, wire: Wire | None
) -> tuple[PyTree, PyTree]:
    """``all_reduce_mean`` on local shards: ``(mean, new state)``.

    A reducer sees whole leaves: its matrices are the parameters', not the shards'.
    """
    key = None if wire is None else wire.key
    extras = () if key is None else (key,)
    kept: PyTree = ()
    if isinstance(codec, Reducer):
        if jax.lax.axis_size(axis) > 1:
            mean, state = all_reduce_mean(tree, axis, codec, topology, key=key, residual=state)
            return mean, state
        # XLA's partitioner refuses a sum over an axis of one device beside automatic axes.
        tree, kept = codec.alone(tree, state)
        codec = None
    if isinstance(codec, ErrorFeedback):

        def with_feedback(x: PyTree, e: PyTree, *key: jax.Array) -> tuple[PyTree, PyTree]:
            return all_reduce_mean(
                x, axis, codec, topology, key=key[0] if key else None, residual=e
            )

        mean, state = on_shards(with_feedback, wire, (tree, state), extras, num_outputs=2)
        return mean, state

    def without(x: PyTree, *key: jax.Array) -> tuple[PyTree]:
        return (all_reduce_mean(x, axis, codec, topology, key=key[0] if key else None),)

    (mean,) = on_shards(without, wire, (tree,), extras)
    return mean, kept
