"""All-gather: what each worker holds, on all of them."""

from typing import Any

import jax

from jdml.communicate.codecs import Codec
from jdml.communicate.collectives.checks import Content
from jdml.communicate.collectives.payloads import Axis, finite, gather, key_of
from jdml.communicate.collectives.rows import exchange_rows

PyTree = Any


def all_gather(
    x: PyTree,
    axis: Axis,
    codec: Content = None,
    *,
    dim: int = 0,
    key: jax.Array | None = None,
    residual: PyTree | None = None,
) -> PyTree:
    """The workers' ``x`` joined along ``dim``, equal on all of them; inside ``shard_map``.

    ``y = (C(x_1), ..., C(x_K))``, bit for bit the same everywhere: a worker, too, takes its own as
    the others read it. It is the pull of a sharded parameter server.

    Args:
      x: Float array or pytree of them, each ``[..., n, ...]``, as each device holds them.
      axis: Name of the worker axis, or names of several, bound by the surrounding ``shard_map``.
      codec: ``None`` for the values as they are, a codec, or ``error_feedback(codec)``.
      dim: The dim of every leaf along which they are joined.
      key: PRNG key, the same on every worker; needed by codecs that draw random numbers.
      residual: With ``error_feedback``: f32, shaped like ``x``, per worker.

    Returns:
      Leaves ``[..., K n, ...]`` in the dtypes of ``x``, unvarying over ``axis``. With ``residual``:
      ``(leaves, residual)``, the residual what others were not told of this worker's ``x``.

    Raises:
      ValueError: a leaf is not floating or has no such dim; the axis is not bound; the codec has no
        payload (a reducer); an argument is missing.

    Bytes each of K workers sends: ``(K-1) c``, c the payload of its own ``x``; without a codec its
    own size, in its own dtype.
    """

    def say(rows: jax.Array, words: Codec, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        me, length = jax.lax.axis_index(axis), rows.shape[1]
        rows = jax.lax.optimization_barrier(rows)
        payload = jax.lax.optimization_barrier(words.encode_rows(rows, key_of(key, me)))
        gathered = words.decode_rows(gather(payload, axis), length)
        return gathered, finite(rows - words.decode_rows(payload, length))

    return exchange_rows("all_gather", x, axis, codec, key, residual, say, join=dim)
