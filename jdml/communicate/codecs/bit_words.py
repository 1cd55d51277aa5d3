"""Subsets of a row as bits of 32-bit words: made, counted, cut and read back by whole vectors.

XLA has no compaction ("the indices where a mask holds") that is fast on CPU: one would sort, or add
up as many numbers as there are elements. Thirty-two to a word, 4 Mi elements are 131,072 words,
made at the speed of memory, and only these are added up.
"""

import dataclasses

import jax
import jax.numpy as jnp

_GREATEST_WIDTH = 128


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which bit stands for which element of a row of ``num_places`` elements.

    A row is ``groups`` groups of ``32 * width`` elements, and a group ``width`` words: bit i of
    word w stands for element ``i * width + w`` of its group, so that words are made from 32
    contiguous runs of elements. A *place* is ``32 * word + bit``; elements near each other have
    places near each other.
    """

    groups: int
    width: int

    @property
    def num_words(self) -> int:
        """Words in a row."""
        return self.groups * self.width

    @property
    def num_places(self) -> int:
        """Elements in a row."""
        return 32 * self.num_words

    def words(self, mask: jax.Array) -> jax.Array:
        """Bool ``[num_rows, num_places]`` to uint32 ``[num_rows, num_words]``."""
        bit = jnp.arange(32, dtype=jnp.uint32)[:, None]
        # Rows and groups as one dim: with a fourth dim XLA's CPU code took three times as long.
        bits = mask.reshape(-1, 32, self.width).astype(jnp.uint32) << bit
        words = jnp.sum(bits, axis=1, dtype=jnp.uint32)
        return words.reshape(mask.shape[0], self.num_words)

    def count(self, mask: jax.Array) -> jax.Array:
        """Elements of each row where the mask holds, int32 ``[num_rows]``.

        By whole vectors, of bytes first: XLA's CPU code for one sum over a row took four times as
        long.
        """
        bits = mask.reshape(-1, 32, self.width).astype(jnp.int8)
        few = jnp.sum(bits, axis=1, dtype=jnp.int8).astype(jnp.int32)
        few = few.reshape(mask.shape[0], self.groups, self.width)
        return jnp.sum(jnp.sum(few, axis=1, dtype=jnp.int32), axis=1, dtype=jnp.int32)

    def elements(self, places: jax.Array) -> jax.Array:
        """Elements at some places, int32; a place past the last is an element past the last."""
        word, bit = places // 32, places % 32
        return 32 * self.width * (word // self.width) + bit * self.width + word % self.width


def layout_of(length: int) -> Layout:
    """The layout of least places, at least ``length``, with groups of at most 4096 elements."""
    num_words = -(-length // 32)
    groups = -(-num_words // _GREATEST_WIDTH)
    return Layout(groups, -(-num_words // groups))


def set_bits(places: jax.Array, num_words: int) -> jax.Array:
    """Words whose bits at ``places`` (int32 ``[num_rows, n]``, no two equal) are one.

    A place past the last bit is left out.
    """
    bits = jnp.uint32(1) << (places % 32).astype(jnp.uint32)
    empty = jnp.zeros((places.shape[0], num_words), jnp.uint32)
    # No bit is set twice, so adding is joining.
    return jax.vmap(lambda e, p, b: e.at[p // 32].add(b, mode="drop"))(empty, places, bits)


def first(words: jax.Array, n: jax.Array) -> jax.Array:
    """The same words with only the first ``n`` (int32 ``[num_rows]``) of each row's bits."""
    counts = _counts(words)
    before = jnp.cumsum(counts, axis=1, dtype=jnp.int32) - counts
    kept = jnp.clip(n[:, None] - before, 0, counts)
    below = (jnp.uint32(1) << _bit_number(words, kept).astype(jnp.uint32)) - 1
    return jnp.where(kept == counts, words, words & below)


def places(words: jax.Array, num_slots: int) -> jax.Array:
    """Places of the first ``num_slots`` bits that are one, ascending: int32, one row per row.

    Where there are fewer, the remaining slots hold the place past the last.
    """

    def one_row(words: jax.Array) -> jax.Array:
        counts = _counts(words)
        before = jnp.cumsum(counts, dtype=jnp.int32) - counts
        number = jnp.arange(words.size, dtype=jnp.int32)
        # Each word that is not empty writes its number to its first slot; the slots after it, up
        # to the next such, are its own.
        slot = jnp.where(counts > 0, before, num_slots)
        word = jnp.zeros(num_slots, jnp.int32).at[slot].set(number, mode="drop")
        word = jax.lax.cummax(word)
        rank = jnp.arange(num_slots, dtype=jnp.int32) - before[word]
        place = 32 * word + _bit_number(words[word], rank)
        return jnp.where(rank < counts[word], place, 32 * words.size)

    return jax.vmap(one_row)(words)


def _counts(words: jax.Array) -> jax.Array:
    return jax.lax.population_count(words).astype(jnp.int32)


def _bit_number(word: jax.Array, rank: jax.Array) -> jax.Array:
    """Number of the bit of ``word`` that has ``rank`` lower ones, by halving."""
    number = jnp.zeros_like(rank)
    for half in (16, 8, 4, 2, 1):
        below = _counts(word & jnp.uint32((1 << half) - 1))
        above = rank >= below
        rank = jnp.where(above, rank - below, rank)
        word = jnp.where(above, word >> half, word)
        number = jnp.where(above, number + half, number)
    return number
