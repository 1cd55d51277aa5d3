"""All-reduce in two phases: all-to-all of encoded chunks, all-gather of encoded means."""

import jax
import jax.numpy as jnp

from jdml.communicate.codecs import Codec
from jdml.communicate.collectives.payloads import Axis, finite, gather, in_chunks, in_one, key_of
from jdml.communicate.collectives.scatter_sum import scatter_sum
from jdml.communicate.error_feedback import ErrorFeedback


def two_phase(
    vector: jax.Array,
    axis: Axis,
    codec: Codec,
    key: jax.Array | None,
    feedback: ErrorFeedback | None,
) -> tuple[jax.Array, jax.Array | None]:
    """Mean of an f32 vector over ``axis``, and what it still owes (with ``feedback``).

    Each worker owns one chunk: it decodes the others' shares of it, adds its own uncompressed,
    encodes the mean once more and sends it to all.

    Bytes each of K workers sends: ``2 (K-1) c``, c the payload of one chunk of ``d / K`` elements.

    Reference: Tang et al., "1-bit Adam", ICML 2021 (compressed all-reduce).
    """
    num_workers = jax.lax.axis_size(axis)
    rows = in_chunks(vector, num_workers, codec)
    total, error = scatter_sum(rows, axis, codec, key_of(key, 0))
    chunk = jax.lax.optimization_barrier(total / num_workers)
    mean, owed = say_chunks(chunk, axis, codec, key_of(key, 1), feedback)
    mean = in_one(mean, vector)
    if feedback is None:
        return mean, None
    error = own_row(error, owed, axis)
    return mean, in_one(error, vector)


def say_chunks(
    chunk: jax.Array,
    axis: Axis,
    codec: Codec,
    key: jax.Array | None,
    feedback: ErrorFeedback | None,
) -> tuple[jax.Array, jax.Array]:
    """Every worker says the mean that it owns to all: the last phase of an all-reduce.

    Args:
      chunk: f32 ``[length]``, the mean over the workers.
      axis: The worker axis or axes.
      codec: Everyone decodes the same bytes, so that results are equal bit for bit.
      key: The same on every worker; each draws its own.
      feedback: With a second side, the error is kept.

    Returns:
      ``(means [num_workers, length], owed [length])``: the owner's error, times the number of
      workers, since it counts as one of their residuals.

    Bytes each of K workers sends: ``(K-1) c``, c the payload of the chunk.
    """
    num_workers, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    payload = jax.lax.optimization_barrier(codec.encode_rows(chunk[None], key_of(key, me)))
    means = codec.decode_rows(gather(payload, axis), len(chunk))
    owed = jnp.zeros_like(chunk)
    if feedback is not None and feedback.two_sided:
        owed = finite(num_workers * (chunk - codec.decode_rows(payload, len(chunk))[0]))
    return means, owed


def own_row(rows: jax.Array, row: jax.Array, axis: Axis) -> jax.Array:
    """``rows`` with the worker's own one replaced."""
    me = jax.lax.axis_index(axis)
    return jax.lax.dynamic_update_index_in_dim(rows, row, me, 0)
