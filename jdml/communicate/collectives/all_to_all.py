"""All-to-all: each worker has a part for each of the others."""

from typing import Any

import jax
import jax.numpy as jnp

from jdml.communicate.codecs import Codec
from jdml.communicate.collectives.checks import Content
from jdml.communicate.collectives.payloads import Axis, finite, key_of, scatter
from jdml.communicate.collectives.rows import exchange_rows

PyTree = Any


def all_to_all(
    x: PyTree,
    axis: Axis,
    codec: Content = None,
    *,
    split_dim: int = 0,
    join_dim: int = 0,
    key: jax.Array | None = None,
    residual: PyTree | None = None,
) -> PyTree:
    """Part k of every worker's ``x``, on worker k, in the workers' order; inside ``shard_map``.

    ``y_k = (C(x_1[k]), ..., x_k[k], ..., C(x_K[k]))``: what a worker keeps is not compressed.

    Args:
      x: Float array or pytree of them, cut into K parts along ``split_dim``, as each device holds
        them.
      axis: Name of the worker axis, or names of several, bound by the surrounding ``shard_map``.
      codec: ``None`` for the values as they are, a codec, or ``error_feedback(codec)``.
      split_dim: The dim of every leaf that is cut.
      join_dim: The dim along which the parts received are joined.
      key: PRNG key, the same on every worker; needed by codecs that draw random numbers.
      residual: With ``error_feedback``: f32, shaped like ``x``, per worker.

    Returns:
      Leaves in the dtypes of ``x``, varying over ``axis``; with ``residual``: ``(leaves,
      residual)``, the residual what the others were not told of this worker's ``x``.

    Raises:
      ValueError: a leaf is not floating or cannot be cut; the axis is not bound; the codec has no
        payload (a reducer); an argument is missing.

    Bytes each of K workers sends: ``(K-1) c``, c the payload of one part; without a codec its own
    size, in its own dtype.
    """

    def say(rows: jax.Array, words: Codec, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        me, length = jax.lax.axis_index(axis), rows.shape[1]
        own = (jnp.arange(rows.shape[0]) == me)[:, None]
        rows = jax.lax.optimization_barrier(rows)
        payload = jax.lax.optimization_barrier(words.encode_rows(rows, key_of(key, me)))
        received = words.decode_rows(scatter(payload, axis), length)
        error = jnp.where(own, 0, rows - words.decode_rows(payload, length))
        return jnp.where(own, rows, received), finite(error)

    return exchange_rows(
        "all_to_all", x, axis, codec, key, residual, say, cut=split_dim, join=join_dim
    )
