"""All-reduce in two phases: all-to-all of encoded chunks, all-gather of encoded means."""

import jax
import jax.numpy as jnp

from jdml.communicate.codecs import Codec
from jdml.communicate.codecs.base import sum_rows
from jdml.communicate.codecs.packing import pack, unpack
from jdml.communicate.error_feedback import ErrorFeedback


def two_phase(
    vector: jax.Array,
    axis: str | tuple[str, ...],
    codec: Codec,
    key: jax.Array | None,
    feedback: ErrorFeedback | None,
) -> tuple[jax.Array, jax.Array | None]:
    """Mean of an f32 vector over ``axis``, and what it still owes (with ``feedback``).

    Each worker owns one chunk: it decodes the others' shares of it, adds its own uncompressed,
    encodes the mean once more and sends it to all.

    Bytes each of K workers sends: ``2 (K-1) c``, c the payload of one chunk of ``d / K`` elements.
    """
    num_workers, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    size = vector.size
    fill = -size % (num_workers * codec.granularity)
    if fill:
        vector = jnp.concatenate([vector, jnp.zeros(fill, vector.dtype)])
    rows = vector.reshape(num_workers, -1)
    # Barriers: fused into its users, an array would be computed once for each of them.
    rows = jax.lax.optimization_barrier(rows)
    length = rows.shape[1]
    own = (jnp.arange(num_workers) == me)[:, None]
    key_out = key_back = None
    if key is not None:
        # Different on every worker, the same on every device of the other axes, so that leaves
        # that are replicated there stay equal.
        key_out, key_back = jax.random.split(jax.random.fold_in(key, me))

    payload = jax.lax.optimization_barrier(codec.encode_rows(rows, key_out))
    received = jax.lax.all_to_all(pack(payload), axis, 0, 0, tiled=True)
    shares = codec.decode_rows(unpack(received, payload), length)
    total = sum_rows(jnp.where(own, rows, shares))
    chunk = jax.lax.optimization_barrier((total / num_workers)[None])

    chunk_payload = jax.lax.optimization_barrier(codec.encode_rows(chunk, key_back))
    gathered = jax.lax.all_gather(pack(chunk_payload), axis, tiled=True, to="invarying")
    mean = codec.decode_rows(unpack(gathered, chunk_payload), length).reshape(-1)[:size]
    if feedback is None:
        return mean, None

    error = rows - codec.decode_rows(payload, length)
    owner_error = jnp.zeros_like(chunk)
    if feedback.two_sided:
        owner_error = num_workers * (chunk - codec.decode_rows(chunk_payload, length))
    error = jnp.where(jnp.isfinite(error), error, 0)
    owner_error = jnp.where(jnp.isfinite(owner_error), owner_error, 0)
    error = jax.lax.dynamic_update_slice_in_dim(error, owner_error, me, 0)
    return mean, error.reshape(-1)[:size]
