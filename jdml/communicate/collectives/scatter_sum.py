"""Each worker sums one chunk of what all of them hold: the first phase of an all-reduce."""

import jax
import jax.numpy as jnp

from jdml.communicate.codecs.base import Codec
from jdml.communicate.collectives.payloads import Axis, finite, key_of, mask_rows, scatter


def scatter_sum(
    rows: jax.Array, axis: Axis, codec: Codec, key: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The sum over the workers of their row k, on worker k; one compressed message to each.

    The worker's own share is added as it is. XLA drops the error where nobody asks for it.

    Args:
      rows: f32 ``[num_workers, length]``.
      axis: The worker axis or axes.
      codec: Each row is encoded by itself.
      key: The same on every worker; each draws its own.

    Returns:
      ``(sum [length], error [num_workers, length])``: the error is what the others were not told;
      summed over the workers, row k is exactly what worker k's sum still lacks.

    Bytes each of K workers sends: ``(K-1) c``, c the payload of one row.
    """
    me = jax.lax.axis_index(axis)
    own = mask_rows(jnp.arange(rows.shape[0]) == me, rows)
    # Zeros in place of the own share decode to zeros, so that the payloads can be summed as such.
    # Barriers: fused into its users, an array would be computed once for each of them.
    others, mine = jax.lax.optimization_barrier(
        (jnp.where(own, 0, rows), jax.lax.dynamic_index_in_dim(rows, me, keepdims=False))
    )
    payload = jax.lax.optimization_barrier(codec.encode_rows(others, key_of(key, me)))
    length = rows.shape[1]
    total = codec.decode_sum(scatter(payload, axis), length) + mine
    return total, finite(others - codec.decode_rows(payload, length))
