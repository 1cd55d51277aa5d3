"""All-reduce over a fast axis inside slow ones: exact where it is cheap, compressed where not."""

import jax
import jax.numpy as jnp

from jdml.communicate.codecs import Codec
from jdml.communicate.collectives.equal import claim_equal
from jdml.communicate.collectives.payloads import (
    Axis,
    gather,
    in_chunks,
    in_one,
    key_of,
    sum_scattered,
)
from jdml.communicate.collectives.two_phase import own_row, two_phase
from jdml.communicate.error_feedback import ErrorFeedback
from jdml.communicate.wire import per_worker


def hierarchical(
    vector: jax.Array,
    axis: Axis,
    codec: Codec,
    key: jax.Array | None,
    feedback: ErrorFeedback | None,
) -> tuple[jax.Array, jax.Array | None]:
    """Mean of an f32 vector over ``axis``, and what it still owes (with ``feedback``).

    ``axis=("slow", "fast")``, the fast one last: exact reduce-scatter along ``fast``, two-phase
    compressed all-reduce of each worker's chunk along the others, exact all-gather along ``fast``.
    The error of a chunk stands in the residuals of the workers that own it.

    Bytes each worker sends, S workers along the slow axes, F along the fast one: ``2 (S-1) c``
    along the slow axes, c the payload of ``d / (S F)`` elements; ``2 (F-1)/F 4 d`` along the fast.

    Reference: Jia et al., "Highly Scalable Deep Learning Training System with Mixed-Precision",
    2018 (hierarchical all-reduce).
    """
    assert isinstance(axis, tuple)
    slow, fast = axis[:-1], axis[-1]
    num_fast = jax.lax.axis_size(fast)
    rows = in_chunks(per_worker(vector, axis), num_fast, codec)
    chunk = sum_scattered(rows, fast)[0] / num_fast
    owed: jax.Array | None = None
    if jax.lax.axis_size(slow) > 1:
        of_chunk = key_of(key, jax.lax.axis_index(fast))
        chunk, owed = two_phase(chunk, slow, codec, of_chunk, feedback)
    chunks = claim_equal(gather(chunk[None], fast), slow)  # one slow worker differs from nobody
    mean = in_one(chunks, vector)
    if feedback is None:
        return mean, None
    error = jnp.zeros_like(rows)
    if owed is not None:
        error = own_row(error, num_fast * owed, fast)
    return mean, in_one(error, vector)
