"""All-reduce by all-gather: everyone says everything once, and everyone sums what it reads."""

import jax

from jdml.communicate.codecs import Codec
from jdml.communicate.collectives.payloads import Axis, finite, gather, key_of, sum_decoded
from jdml.communicate.error_feedback import ErrorFeedback


def gather_sum(
    vector: jax.Array,
    axis: Axis,
    codec: Codec,
    key: jax.Array | None,
    feedback: ErrorFeedback | None,
) -> tuple[jax.Array, jax.Array | None]:
    """Mean of an f32 vector over ``axis``, and what it still owes (with ``feedback``).

    Each worker's payload of the whole vector goes to all; the worker, too, counts its own share as
    the others read it. One error, of one compression: ``error_feedback`` has no second side here.
    For few workers, or codecs whose sum is much larger than a share, such as ``top_k``.

    Bytes each of K workers sends: ``(K-1) c``, c the payload of the whole vector.
    """
    num_workers, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    # As a row: behind the barrier another shape would be another array.
    row = jax.lax.optimization_barrier(vector[None])
    payload = jax.lax.optimization_barrier(codec.encode_rows(row, key_of(key, me)))
    mean = sum_decoded(codec, gather(payload, axis), len(vector), num_workers)
    if feedback is None:
        return mean, None
    return mean, finite(row - codec.decode_rows(payload, len(vector)))[0]
