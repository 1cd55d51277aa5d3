"""Broadcast: what one worker holds, on all of them."""

from typing import Any

import jax
import jax.numpy as jnp

from jdml.communicate.codecs import Codec
from jdml.communicate.collectives.checks import Content
from jdml.communicate.collectives.equal import claim_equal
from jdml.communicate.collectives.payloads import (
    Axis,
    Values,
    carried,
    finite,
    in_chunks,
    key_of,
)
from jdml.communicate.collectives.rows import exchange_rows
from jdml.communicate.permute import permute
from jdml.communicate.wire import per_worker

PyTree = Any

PIECE_BYTES = 1 << 15
"""The least that is worth a message of its own."""


def broadcast(
    x: PyTree,
    axis: Axis,
    codec: Content = None,
    *,
    root: int = 0,
    key: jax.Array | None = None,
    residual: PyTree | None = None,
) -> PyTree:
    """The ``x`` of worker ``root`` on every worker; inside ``shard_map``.

    ``y = C(x_root)``, bit for bit the same everywhere, on the root too.

    Args:
      x: Float array or pytree of them, as each device holds them; only the root's are read.
      axis: Name of the worker axis, or names of several, bound by the surrounding ``shard_map``.
      codec: ``None`` for the values as they are, a codec, or ``error_feedback(codec)``.
      root: The worker that speaks, as ``jax.lax.axis_index(axis)`` numbers them.
      key: PRNG key, the same on every worker; needed by codecs that draw random numbers.
      residual: With ``error_feedback``: f32, shaped like ``x``; zeros but on the root.

    Returns:
      Leaves shaped like ``x``, in its dtypes, unvarying over ``axis``; with ``residual``:
      ``(leaves, residual)``.

    Raises:
      ValueError: a leaf is not floating; the axis is not bound, or has no worker ``root``; the
        codec has no payload (a reducer); an argument is missing.

    Bytes, where c is the payload (without a codec its own size): a short one goes down a binomial
    tree, of which the root sends ``ceil(log2 K) c`` and all together ``(K-1) c``. A long one goes
    down a chain in p pieces, of which nobody sends more than ``(1 + (K-2) / p) c``, with ``p = 8
    (K-2)`` or as many as have 32 KiB: fewer than a masked sum, ``2 (K-1)/K c``, from 3 workers on.

    Reference: Watts and van de Geijn, "A Pipelined Broadcast for Multidimensional Meshes", 1995.
    """

    def say(rows: jax.Array, words: Codec, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        num_workers, length = int(jax.lax.axis_size(axis)), rows.shape[1]
        if not 0 <= root < num_workers:
            raise ValueError(
                f"broadcast: root={root}; axis {axis!r} has workers 0 to {num_workers - 1}."
            )
        payload = jax.lax.optimization_barrier(words.encode_rows(rows, key_of(key, root)))
        heard = carried(payload, lambda buffer: _from_root(buffer, axis, root))
        said = claim_equal(words.decode_rows(heard, length), axis)
        error = finite(rows - words.decode_rows(payload, length))
        return said, jnp.where(jax.lax.axis_index(axis) == root, error, 0)

    return exchange_rows("broadcast", x, axis, codec, key, residual, say)


def num_pieces(num_bytes: int, num_workers: int) -> int:
    """Pieces in which a message goes down the chain; 0 if it had better go down the tree."""
    pieces = min(8 * (num_workers - 2), num_bytes // PIECE_BYTES)
    if pieces < 1:
        return 0
    hops = (num_workers - 1).bit_length()
    return pieces if pieces + num_workers - 2 < hops * pieces else 0


def _from_root(buffer: jax.Array, axis: Axis, root: int) -> jax.Array:
    num_workers = int(jax.lax.axis_size(axis))
    rank = (jax.lax.axis_index(axis) - root) % num_workers
    buffer = per_worker(buffer, axis)
    pieces = num_pieces(buffer.size * buffer.dtype.itemsize, num_workers)
    if pieces:
        return _chain(buffer, axis, root, rank, num_workers, pieces)
    reached = 1
    while reached < num_workers:
        pairs = [(r, r + reached) for r in range(min(reached, num_workers - reached))]
        heard = permute(buffer, axis, _from(root, pairs, num_workers))
        buffer = jnp.where((rank >= reached) & (rank < 2 * reached), heard, buffer)
        reached *= 2
    return buffer


def _chain(
    buffer: jax.Array, axis: Axis, root: int, rank: jax.Array, num_workers: int, num_pieces: int
) -> jax.Array:
    """While a worker passes one piece on, it hears the next."""
    pieces = in_chunks(buffer.reshape(-1), num_pieces, Values())
    pairs = _from(root, [(r, r + 1) for r in range(num_workers - 1)], num_workers)

    def turn(t: jax.Array, pieces: jax.Array) -> jax.Array:
        out = jax.lax.dynamic_index_in_dim(pieces, jnp.clip(t - rank, 0, num_pieces - 1))
        heard = permute(out, axis, pairs)
        number = t - rank + 1
        place = jnp.clip(number, 0, num_pieces - 1)
        is_new = (rank > 0) & (number == place)
        known = jax.lax.dynamic_index_in_dim(pieces, place)
        return jax.lax.dynamic_update_slice_in_dim(
            pieces, jnp.where(is_new, heard, known), place, 0
        )

    pieces = jax.lax.fori_loop(0, num_pieces + num_workers - 2, turn, pieces)
    return pieces.reshape(-1)[: buffer.size].reshape(buffer.shape)


def _from(root: int, pairs: list[tuple[int, int]], num_workers: int) -> list[tuple[int, int]]:
    return [((a + root) % num_workers, (b + root) % num_workers) for a, b in pairs]
