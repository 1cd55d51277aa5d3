"""All-reduce by recursive doubling: pairs, then pairs of pairs, exchange what they have summed."""

import jax
import jax.numpy as jnp

from jdml.communicate.codecs import Codec
from jdml.communicate.codecs.base import Payload
from jdml.communicate.collectives.equal import claim_equal
from jdml.communicate.collectives.payloads import Axis, finite, key_of, send, sum_decoded
from jdml.communicate.error_feedback import ErrorFeedback
from jdml.communicate.wire import per_worker


def tree(
    vector: jax.Array,
    axis: Axis,
    codec: Codec,
    key: jax.Array | None,
    feedback: ErrorFeedback | None,
) -> tuple[jax.Array, jax.Array | None]:
    """Mean of an f32 vector over ``axis``, and what it still owes (with ``feedback``).

    With ``2^m`` workers: in round r those of a group of ``2^r`` hold the same sum and exchange it
    with the group beside theirs. Everyone counts its own sum as the other side reads it, and the
    lower group's first, so that after m rounds all hold the same bits (on machines that compute
    alike). The error of a group's sum is shared by its ``2^r`` workers. Other numbers: the workers
    past the last power of two tell theirs to a partner before, which sends them the mean after,
    encoded once more; everyone takes it as they read it.

    Few messages, of the whole vector: for short vectors or slow starts. The two sides of
    ``error_feedback`` differ only in that last message: all else is error of what a worker says.

    Bytes the busiest of K workers sends: ``m c``, c the payload of the whole vector, ``m =
    floor(log2 K)``; ``(m + 1) c`` where K is no power of two. Permutations leave the type of the
    result varying, and an all-gather would send up to twice the last message just to tell it:
    :func:`~jdml.communicate.collectives.equal.claim_equal` says it for nothing.

    Reference: Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication Operations
    in MPICH", IJHPCA 2005.
    """
    num_workers, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    rounds = num_workers.bit_length() - 1
    num_main = 1 << rounds
    folded = [(num_main + i, i) for i in range(num_workers - num_main)]
    is_main, length = me < num_main, len(vector)
    total = per_worker(vector, axis)
    owed = jnp.zeros_like(total)

    def encode(x: jax.Array, *numbers: int | jax.Array) -> Payload:
        return jax.lax.optimization_barrier(codec.encode_rows(x[None], key_of(key, *numbers)))

    def lost(x: jax.Array, payload: Payload) -> jax.Array:
        return finite(x - codec.decode_rows(payload, length)[0])

    if folded:
        payload = encode(total, 0, me)
        if feedback is not None:
            owed = jnp.where(is_main, 0, lost(total, payload))
        heard = codec.decode_rows(send(payload, axis, folded), length)[0]
        total = jnp.where(me < len(folded), total + heard, total)
    for r in range(rounds):
        size = 1 << r
        pairs = [(i, i ^ size) for i in range(num_main)]
        total = jax.lax.optimization_barrier(total)
        payload = encode(total, 1 + r, me >> r)  # one key for those who hold the same sum
        if feedback is not None:
            owed = owed + jnp.where(is_main, lost(total, payload) / size, 0)
        heard, upper = send(payload, axis, pairs), (me & size) != 0
        # By position, not by whose it is: additions fused with decoding round their two sides
        # differently.
        both = jax.tree.map(
            lambda a, b, upper=upper: jnp.concatenate(
                [jnp.where(upper, b, a), jnp.where(upper, a, b)]
            ),
            payload,
            heard,
        )
        total = sum_decoded(codec, jax.lax.optimization_barrier(both), length)
    mean = jax.lax.optimization_barrier(total / num_workers)
    if folded:
        payload = encode(mean, 1 + rounds)
        if feedback is not None and feedback.two_sided:
            share = lost(mean, payload) * (num_workers / num_main)
            owed = owed + jnp.where(is_main, share, 0)
        heard = send(payload, axis, [(i, j) for j, i in folded])
        payload = jax.tree.map(lambda a, b: jnp.where(is_main, a, b), payload, heard)
        mean = codec.decode_rows(payload, length)[0]
    return claim_equal(mean, axis), None if feedback is None else owed
