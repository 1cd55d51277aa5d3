"""All-reduce round a ring: sums travel and grow, requantised at each hop; the means follow."""

import jax

from jdml.communicate.codecs import Codec
from jdml.communicate.collectives.payloads import Axis, finite, in_chunks, in_one, key_of, send
from jdml.communicate.collectives.two_phase import own_row, say_chunks
from jdml.communicate.error_feedback import ErrorFeedback
from jdml.communicate.wire import per_worker


def ring(
    vector: jax.Array,
    axis: Axis,
    codec: Codec,
    key: jax.Array | None,
    feedback: ErrorFeedback | None,
) -> tuple[jax.Array, jax.Array | None]:
    """Mean of an f32 vector over ``axis``, and what it still owes (with ``feedback``).

    In each of K-1 hops a worker sends the sum of one chunk so far to its right and adds its own
    share to the one that it hears from its left. The sum of chunk k ends at worker k, which encodes
    the mean; that payload goes round unchanged (an all-gather), so that results are equal bit for
    bit. A worker sends each chunk but its own once: the hop's error stands there in its residual,
    and the error of the mean, times K, in its own chunk.

    The error of the mean grows with K, since a share is quantised up to K-1 times: two-phase sends
    as many bytes and quantises it twice. The ring's worth is that it needs links to two neighbours
    only.

    Bytes each of K workers sends: ``2 (K-1) c``, c the payload of one chunk of ``d / K`` elements.

    Reference: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of
    workstations", JPDC 2009.
    """
    num_workers, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    right = [(i, (i + 1) % num_workers) for i in range(num_workers)]
    rows = in_chunks(per_worker(vector, axis), num_workers, codec)
    length = rows.shape[1]

    def hop(
        turn: int | jax.Array, rows: jax.Array, heard: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Sends one partial sum on; what it fails to say takes its place in ``rows``."""
        chunk = (me - 1 - turn) % num_workers
        part = jax.lax.dynamic_index_in_dim(rows, chunk)
        if heard is not None:
            part = part + heard
        part = jax.lax.optimization_barrier(part)
        payload = jax.lax.optimization_barrier(codec.encode_rows(part, key_of(key, 0, turn, me)))
        if feedback is not None:
            error = finite(part - codec.decode_rows(payload, length))
            rows = jax.lax.dynamic_update_slice_in_dim(rows, error, chunk, 0)
        return rows, codec.decode_rows(send(payload, axis, right), length)

    rows, heard = hop(0, rows, None)
    # A loop, so that the program stays as small on 64 workers as on three.
    if num_workers > 2:
        rows, heard = jax.lax.fori_loop(1, num_workers - 1, lambda s, c: hop(s, *c), (rows, heard))
    total = jax.lax.dynamic_index_in_dim(rows, me, keepdims=False) + heard[0]
    chunk = jax.lax.optimization_barrier(total / num_workers)
    mean, owed = say_chunks(chunk, axis, codec, key_of(key, 1), feedback)
    mean = in_one(mean, vector)
    if feedback is None:
        return mean, None
    return mean, in_one(own_row(rows, owed, axis), vector)
