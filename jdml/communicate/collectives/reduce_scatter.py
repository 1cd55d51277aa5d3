"""Reduce-scatter of a mean: each worker takes its own part of it."""

from typing import Any

import jax
import jax.numpy as jnp

from jdml.communicate.codecs import Codec
from jdml.communicate.collectives.checks import Content
from jdml.communicate.collectives.payloads import Axis, Values, sum_scattered
from jdml.communicate.collectives.rows import exchange_rows
from jdml.communicate.collectives.scatter_sum import scatter_sum

PyTree = Any


def reduce_scatter_mean(
    x: PyTree,
    axis: Axis,
    codec: Content = None,
    *,
    dim: int = 0,
    key: jax.Array | None = None,
    residual: PyTree | None = None,
) -> PyTree:
    """Part k of the mean of ``x``, cut along ``dim``, on worker k; inside ``shard_map``.

    ``y_k = (1/K) sum_j C(x_j)[k]``, its own share uncompressed; sums are f32. It is the push of a
    sharded parameter server, and with :func:`all_gather` of ``y`` a two-phase all-reduce.

    Args:
      x: Float array or pytree of them, each ``[..., K n, ...]``, as each device holds them.
      axis: Name of the worker axis, or names of several, bound by the surrounding ``shard_map``.
      codec: ``None`` for the exact mean, a codec, or ``error_feedback(codec)``.
      dim: The dim of every leaf that is cut.
      key: PRNG key, the same on every worker; needed by codecs that draw random numbers.
      residual: With ``error_feedback``: f32, shaped like ``x``, per worker.

    Returns:
      Leaves ``[..., n, ...]`` in the dtypes of ``x``, varying over ``axis``. With ``residual``:
      ``(means, residual)``; part k of the residuals, averaged over the workers, is what worker k's
      mean still lacks.

    Raises:
      ValueError: a leaf is not floating or cannot be cut; the axis is not bound; the codec has no
        payload (a reducer); an argument is missing.

    Bytes each of K workers sends: ``(K-1) c``, c the payload of one part; without a codec ``4 n``.
    """

    def say(rows: jax.Array, words: Codec, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        num_workers = rows.shape[0]
        if isinstance(words, Values):
            rows = rows.astype(jnp.float32)
            return sum_scattered(rows, axis) / num_workers, jnp.zeros_like(rows)
        total, error = scatter_sum(rows, axis, words, key)
        return total[None] / num_workers, error

    return exchange_rows("reduce_scatter_mean", x, axis, codec, key, residual, say, cut=dim)
