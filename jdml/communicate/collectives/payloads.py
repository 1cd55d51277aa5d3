"""Payloads through JAX's collectives: each in one operation, byte for byte."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp

from jdml.communicate.codecs.base import Codec, Payload
from jdml.communicate.codecs.packing import pack, unpack
from jdml.communicate.kernels.here import traced_for_tpu
from jdml.communicate.permute import permute
from jdml.communicate.tiles import LANES, InTiles

Axis = str | tuple[str, ...]

TILE = 8 * LANES
"""Elements in one of TPU's tiles of f32."""


@dataclasses.dataclass(frozen=True)
class Values(Codec):
    """What ``codec=None`` says: the values themselves, in their own dtype."""

    elementwise: ClassVar[bool] = True

    @property
    def granularity(self) -> int:
        return 1

    def encode_rows(self, rows: jax.Array, key: jax.Array | None = None) -> jax.Array:
        del key
        return rows

    def decode_rows(self, payload: jax.Array, length: int) -> jax.Array:
        del length
        return payload

    def payload_bytes(self, length: int) -> int:
        return 4 * length


def scatter(payload: Payload, axis: Axis) -> Payload:
    """Row k goes to worker k; returns the rows received, in the order of the senders."""
    return carried(payload, lambda x: jax.lax.all_to_all(x, axis, 0, 0, tiled=True))


def gather(payload: Payload, axis: Axis) -> Payload:
    """Every worker's rows, one after the other, in unvarying type."""
    return carried(payload, lambda x: jax.lax.all_gather(x, axis, tiled=True, to="invarying"))


def send(payload: Payload, axis: Axis, pairs: Sequence[tuple[int, int]]) -> Payload:
    """What the worker at the other end of ``(source, target)`` says; bytes of zero from nobody."""
    return carried(payload, lambda x: permute(x, axis, pairs))


def carried(payload: Payload, collective: Callable[[jax.Array], jax.Array]) -> Payload:
    """``payload`` through ``collective``, which takes one array, and more rows or fewer back."""
    leaves, treedef = jax.tree.flatten(payload)
    # An array of whole words keeps its width on the wire: there is nothing to join or to pack.
    if len(leaves) == 1 and leaves[0].dtype.itemsize >= 4:
        return jax.tree.unflatten(treedef, [collective(leaves[0])])
    return unpack(collective(pack(payload)), payload)


def sum_scattered(rows: jax.Array, axis: Axis) -> jax.Array:
    """The exact sum over the workers of their row k, on worker k: ``[1, ...]``.

    TPU makes an all-reduce, of twice the bytes, of any reduce-scatter but one along the outer dim
    of an array of whole tiles (v5e, libtpu 0.0.42 and 0.0.51).
    """
    num_rows, length = rows.shape[0], math.prod(rows.shape[1:])
    flat = rows.reshape(num_rows, length)
    fill = -length % TILE if traced_for_tpu() else 0
    if fill:
        flat = jnp.concatenate([flat, jnp.zeros((num_rows, fill), rows.dtype)], axis=1)
    if flat.shape[1] % TILE == 0:
        flat = flat.reshape(num_rows, -1, LANES)
    total = jax.lax.psum_scatter(flat, axis, tiled=True)
    return total.reshape(1, -1)[:, :length].reshape(1, *rows.shape[1:])


def in_chunks(vector: jax.Array, num_chunks: int, codec: Codec) -> jax.Array:
    """``[num_chunks, length, ...]``, rows that the codec takes for whole, filled up with zeros."""
    fill = num_chunks * codec.whole(-(-len(vector) // num_chunks)) - len(vector)
    if fill:
        vector = jnp.concatenate([vector, jnp.zeros((fill, *vector.shape[1:]), vector.dtype)])
    return vector.reshape(num_chunks, -1, *vector.shape[1:])


def in_one(chunks: jax.Array, like: jax.Array) -> jax.Array:
    """The inverse of :func:`in_chunks`: a vector as long as ``like``."""
    return chunks.reshape(-1, *like.shape[1:])[: len(like)]


def mask_rows(mask: jax.Array, rows: jax.Array) -> jax.Array:
    """Bool ``[num_rows]`` in a shape that broadcasts with ``rows [num_rows, ...]``."""
    return mask.reshape(-1, *[1] * (rows.ndim - 1))


def sum_decoded(codec: Codec, payload: Payload, length: int, divisor: int = 1) -> jax.Array:
    """Sum of the decoded rows over ``divisor``, f32 ``[length]``, without a matrix of them all."""
    inner = codec.codec if isinstance(codec, InTiles) else codec
    if type(inner).decode_sum is not Codec.decode_sum:
        return codec.decode_sum(payload, length, divisor)

    def row(k: int | jax.Array) -> jax.Array:
        one = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, k, 1), payload)
        return codec.decode_rows(one, length)[0]

    num_rows = jax.tree.leaves(payload)[0].shape[0]
    if num_rows > 32:
        total = jax.lax.fori_loop(1, num_rows, lambda k, total: total + row(k), row(0))
    else:
        total = row(0)
        for k in range(1, num_rows):
            total = total + row(k)
    return total if divisor == 1 else total / divisor


def finite(error: jax.Array) -> jax.Array:
    """What may be kept in a residual: a value that is not finite would poison it for good."""
    return jnp.where(jnp.isfinite(error), error, 0)


def key_of(key: jax.Array | None, *numbers: int | jax.Array) -> jax.Array | None:
    """A key for each tuple of numbers; none from none."""
    for number in numbers:
        key = None if key is None else jax.random.fold_in(key, number)
    return key
