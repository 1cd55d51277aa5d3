"""A device's queries stay, and the keys and values of all positions pass it piece by piece.

A *piece* is a little of what each device holds. The next one is on its way while the queries meet
the one that is there; in the backward pass a piece's gradients leave for home as soon as they are
known. So a device never has more than two pieces of the keys and one of their gradients, and with
2K pieces that is what it holds itself: all memory is O(seq / K).

Under a causal mask a chunk of n blocks has less to do with its late keys than with its early ones:
block b is seen by n − b blocks of its own chunk. A piece takes early blocks of a device's part and
as many late ones, blocks b and n − 1 − b (of its other chunk, in zig-zag order) together n + 1, so
that all pieces are equal work, and no block of scores that causality rules out is computed.
"""

import abc
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdml.models.attention.blocks import (
    Gradients,
    Pair,
    Pairs,
    Summed,
    attend_pairs,
    causal_pairs,
    gradients_of_pairs,
    no_gradients,
    nothing_seen,
)
from jdml.models.attention.blocks import Saved as SavedOfQueries
from jdml.models.attention.form import Form

_SEQ = 2  # of keys [batch, kv_heads, seq, head_dim]


class Meeting(NamedTuple):
    """Which of a device's chunks of queries meet which chunks of all keys under a causal mask.

    Chunks are numbered by their places: the queries' on the device, the keys' in the devices'
    order. The chunks of ``num_own`` parts meet themselves, and ``own(i)`` says which is the first
    of a part; ``num_earlier`` pairs are of a chunk and an earlier one, ``earlier(i)``. Both give
    (queries, keys).
    """

    num_own: Any
    own: Any
    num_earlier: Any
    earlier: Any


class Cut(NamedTuple):
    """How a device's positions are cut.

    Attributes:
      chunks: of a device: 2 in zig-zag order, else 1.
      blocks: of a chunk.
      size: positions of a block.
      pieces: of the keys; 1, or ``chunks · blocks`` is a multiple of 2 · pieces.
    """

    chunks: int
    blocks: int
    size: int
    pieces: int

    @property
    def half(self) -> int:
        """Blocks of a piece that are early, and that are late."""
        return self.chunks * self.blocks // (2 * self.pieces)

    def take(self, x: jax.Array, number: Any) -> jax.Array:
        """Of a device's [batch, kv_heads, seq / K, head_dim] what a piece takes, blocks in their
        order."""
        if self.pieces == 1:
            return x
        taken = [self._slice(x, at) for at in self._starts(x, number)]
        return jnp.concatenate(taken, _SEQ)

    def put(self, x: jax.Array, piece: jax.Array, number: Any) -> jax.Array:
        """``x`` with what ``take`` would take of it replaced."""
        if self.pieces == 1:
            return piece
        for at, half in zip(self._starts(x, number), jnp.split(piece, 2, _SEQ), strict=True):
            x = jax.lax.dynamic_update_slice_in_dim(x, half, at, _SEQ)
        return x

    def pairs(self, number: Any, meeting: Meeting) -> Pairs:
        """Blocks of queries and blocks of a piece, of all devices, that they meet.

        The block that a query meets first holds a key that it may see: the first of its chunk, or
        its own; later pieces find sums that are begun.
        """
        per_chunk = self.blocks // self.pieces
        of_own = self._own_pairs(number)
        square = self.blocks * per_chunk

        def pair(index: Any) -> Pair:
            is_own = index < meeting.num_own * of_own.count
            within = of_own.pair(index % of_own.count)
            rest = index - meeting.num_own * of_own.count
            at = rest % square
            # A key of an earlier chunk is visible: any distance beyond a block will do.
            earlier = Pair(at // per_chunk * self.size, at % per_chunk * self.size, self.size)
            chunks = zip(
                meeting.own(index // of_own.count), meeting.earlier(rest // square), strict=True
            )
            of_query, of_key = (jnp.where(is_own, a, b) for a, b in chunks)
            queries, keys, distance = (
                jnp.where(is_own, a, b) for a, b in zip(within, earlier, strict=True)
            )
            return Pair(
                of_query * (self.blocks * self.size) + queries,
                of_key * (per_chunk * self.size) + keys,
                distance,
            )

        return Pairs(meeting.num_own * of_own.count + meeting.num_earlier * square, pair)

    def _own_pairs(self, number: Any) -> Pairs:
        """Of a part's blocks of queries and what a piece has of its keys."""
        if self.chunks == self.pieces == 1:
            return causal_pairs(self.blocks * self.size, self.size)
        to_late = (self.chunks - 1) * self.blocks  # blocks from the first chunk to the last

        def pair(index: Any) -> Pair:
            row, column = index // (self.blocks + 1), index % (self.blocks + 1)
            early = number * self.half + row
            late = self.blocks - 1 - early
            is_early = column <= late
            key = jnp.where(is_early, early, late)
            query = jnp.where(is_early, early + column, column - 1)
            at = query + jnp.where(is_early, 0, to_late)
            place = jnp.where(is_early, row, 2 * self.half - 1 - row)
            return Pair(at * self.size, place * self.size, (query - key) * self.size)

        return Pairs(self.half * (self.blocks + 1), pair)

    def _starts(self, x: jax.Array, number: Any) -> tuple[Any, Any]:
        """Where the early and the late blocks of a piece begin."""
        half = self.half * self.size
        return number * half, x.shape[_SEQ] - (number + 1) * half

    def _slice(self, x: jax.Array, at: Any) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, at, self.half * self.size, _SEQ)


@dataclass(frozen=True)
class InPieces(Form):
    """What ``gathered`` and ``ulysses`` have in common."""

    @abc.abstractmethod
    def fetch(self, pair: jax.Array) -> jax.Array:
        """A device's piece of keys and values [2, batch, kv_heads, piece, head_dim] → that of all
        devices, in their order, for the heads of this device's queries."""

    @abc.abstractmethod
    def hand_back(self, pair: jax.Array, like: jax.Array) -> jax.Array:
        """The gradient of ``fetch``, summed over the devices: float32, as what was fetched → in the
        dtype of ``like``, as what was given."""

    @abc.abstractmethod
    def meeting(self) -> Meeting:
        """Which chunks meet."""

    def cut(self, length: int) -> Cut:
        """How a device's ``length`` positions are cut: into up to 2K pieces of whole blocks."""
        chunks = 2 if self.order == "zigzag" and self.axis_size > 1 else 1
        size = self.block_of(length)
        blocks = length // chunks // size
        most = 2 * self.axis_size if self.axis_size > 1 else 1
        pieces = max(p for p in range(1, most + 1) if p == 1 or chunks * blocks % (2 * p) == 0)
        return Cut(chunks, blocks, size, pieces)

    def attend(self, queries: jax.Array, key: jax.Array, value: jax.Array) -> Summed:
        """The sums over all keys.

        Args:
          queries: [batch, kv_heads, group, seq, head_dim], what stays.
          key, value: [batch, kv_heads, seq / K, head_dim], the device's positions.
        """
        cut, meeting = self.cut(key.shape[_SEQ]), self.meeting()

        def meet(number: Any, summed: Summed, held: jax.Array) -> Summed:
            pairs = cut.pairs(number, meeting)
            return attend_pairs(summed, queries, held[0], held[1], pairs, cut.size, self.causal)

        def turn(number: Any, carry: Any) -> Any:
            summed, held = carry
            arriving = self._fetch(cut, key, value, number + 1)
            return meet(number, summed, held), arriving

        carry = nothing_seen(queries), self._fetch(cut, key, value, 0)
        summed, held = jax.lax.fori_loop(0, cut.pieces - 1, turn, carry)
        return meet(cut.pieces - 1, summed, held)

    def gradients(self, saved: SavedOfQueries, key: jax.Array, value: jax.Array) -> Gradients:
        """Of queries (float32), and of the device's keys and values in their dtype."""
        cut, meeting = self.cut(key.shape[_SEQ]), self.meeting()

        def meet(number: Any, held: jax.Array, sums: Gradients) -> Gradients:
            zeros = no_gradients(saved.query, held[0])._replace(query=sums.query)
            pairs = cut.pairs(number, meeting)
            of_query, *of_held = gradients_of_pairs(
                zeros, saved, held[0], held[1], pairs, cut.size, self.causal
            )
            of_key, of_value = self.hand_back(jnp.stack(of_held), key)
            return Gradients(
                of_query,
                cut.put(sums.key, of_key, number),
                cut.put(sums.value, of_value, number),
            )

        def turn(number: Any, carry: Any) -> Any:
            sums, held = carry
            arriving = self._fetch(cut, key, value, number + 1)
            return meet(number, held, sums), arriving

        zeros = Gradients(
            jnp.zeros_like(saved.query, jnp.float32), jnp.zeros_like(key), jnp.zeros_like(value)
        )
        carry = zeros, self._fetch(cut, key, value, 0)
        sums, held = jax.lax.fori_loop(0, cut.pieces - 1, turn, carry)
        return meet(cut.pieces - 1, held, sums)

    def _fetch(self, cut: Cut, key: jax.Array, value: jax.Array, number: Any) -> jax.Array:
        return self.fetch(jnp.stack([cut.take(key, number), cut.take(value, number)]))
