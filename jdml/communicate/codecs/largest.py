"""The k elements of largest magnitude of each row, exactly and without sorting.

Magnitudes are compared as integers: the bits of ``|x|`` order every f32, subnormal numbers (which
XLA's arithmetic takes for zero) included, with infinity above all finite numbers and NaN on top. So
what is not finite is always among the largest.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jdml.communicate.codecs.bit_words import Layout, first, places

_TOP = 0x7FFFFFFF
_SAMPLE = 1 << 16
_RUN = 16  # neighbours that are sampled together: a line of a cache, which is read as a whole
Bounds = tuple[jax.Array, jax.Array, jax.Array]


def magnitude_bits(x: jax.Array) -> jax.Array:
    """The bits of ``|x|`` of an f32 array as int32, in the order of the magnitudes.

    All below ``_TOP``: the last NaN counts as the one before it.
    """
    return jnp.minimum(jax.lax.bitcast_convert_type(x, jnp.int32) & _TOP, _TOP - 1)


def largest(rows: jax.Array, layout: Layout, k: int, floor: int = 1) -> jax.Array:
    """Places of the ``k`` largest magnitudes of each row, ascending, int32 ``[num_rows, k]``.

    A bound with k to 1.5 k elements on or above it is guessed from a sample; where the guess is
    bad, halving the range of the bits finds one in ten passes or so that only count. These
    candidates are picked and narrowed down to k. Of equal magnitudes the lowest places are taken.

    Args:
      rows: f32 ``[num_rows, layout.num_places]``.
      layout: Where each element's bit is.
      k: At most ``layout.num_places``.
      floor: Least :func:`magnitude_bits` that counts, at least 1: zeros are never taken.

    Returns:
      Places, ascending; where a row has fewer than k such elements, the rest is ``num_places``.
    """
    num_candidates = k + k // 2 + 32
    if 4 * num_candidates > layout.num_places:
        return places(largest_words(rows, layout, k, k, floor), k)
    coarse = largest_words(rows, layout, k, num_candidates, floor)
    found = places(coarse, num_candidates)
    candidates = take(rows, layout.elements(found))
    return _narrow(magnitude_bits(candidates), found, k, layout.num_places)


def largest_words(rows: jax.Array, layout: Layout, k: int, limit: int, floor: int = 1) -> jax.Array:
    """The set of each row's largest magnitudes: the k largest, and at most ``limit`` members.

    Fewer where fewer reach ``floor``. Arguments as in :func:`largest`; words in ``layout``.
    """

    def at_least(bound: jax.Array) -> jax.Array:
        # The barrier keeps XLA from moving the bits out of the loop as one more array.
        again, bound = jax.lax.optimization_barrier((rows, bound))
        return magnitude_bits(again) >= bound[:, None]

    def count_from(bound: jax.Array) -> jax.Array:
        return layout.count(at_least(bound))

    def search(tried: tuple[jax.Array, jax.Array] | None) -> jax.Array:
        like = magnitude_bits(rows[:, 0])
        low, high, num_low = _halve(count_from, like, k, limit, floor, tried)

        def cut() -> jax.Array:
            """Too many: those between the bounds are equal, and some of them will do."""
            low_words, above = layout.words(at_least(low)), layout.words(at_least(high))
            some = above | first(low_words & ~above, limit - count_from(high))
            return jnp.where((num_low > limit)[:, None], some, low_words)

        return jax.lax.cond(jnp.any(num_low > limit), cut, lambda: layout.words(at_least(low)))

    guess = _sampled_bound(rows, (k + limit) // 2, floor) if limit > k else None
    if guess is None:
        return search(None)
    # The words that the guess makes tell how many they are: most often one pass is all.
    words = layout.words(at_least(guess))
    num = jnp.sum(jax.lax.population_count(words), axis=1, dtype=jnp.uint32).astype(jnp.int32)
    is_good = jnp.all((k <= num) & (num <= limit))
    return jax.lax.cond(is_good, lambda: words, lambda: search((guess, num)))


def take(rows: jax.Array, elements: jax.Array) -> jax.Array:
    """``rows[r, elements[r]]``, zero past the end of a row."""
    return jnp.take_along_axis(rows, elements, axis=1, mode="fill", fill_value=0)


def _sampled_bound(rows: jax.Array, wanted: int, floor: int) -> jax.Array | None:
    """The bits that about ``wanted`` elements of each row reach, judged by every so many-th line.

    ``None`` for rows too short to be judged so, or if fewer than a few in the sample would do.
    """
    stride = rows.shape[1] // _SAMPLE
    in_sample = wanted // max(stride, 1)
    if stride < 4 or in_sample < 32:
        return None
    whole = rows.shape[1] // (stride * _RUN) * stride * _RUN
    runs = rows[:, :whole].reshape(-1, stride, _RUN)[:, 0]
    bits = magnitude_bits(runs.reshape(rows.shape[0], -1))

    def count_from(bound: jax.Array) -> jax.Array:
        return jnp.sum(bits >= bound[:, None], axis=1, dtype=jnp.int32)

    return _halve(count_from, bits[:, 0], in_sample, in_sample + in_sample // 64, floor)[0]


def _halve(
    count_from: Callable[[jax.Array], jax.Array],
    like: jax.Array,
    k: int,
    limit: int,
    floor: int,
    tried: tuple[jax.Array, jax.Array] | None = None,
) -> Bounds:
    """Bounds ``(low, high, number on or above low)`` of each row, int32 ``[num_rows]``.

    On or above ``low`` there are at most ``limit``, or else ``high`` is ``low + 1`` and fewer than
    k are on or above it. Unless fewer than k reach ``floor``, k are on or above ``low``.
    ``tried``: bounds of which it is known how many are on or above them.
    """
    # Made from data, so that the loop's state varies over the mesh axes that the rows vary over.
    zero = like & 0
    low, high = zero + floor, zero + _TOP

    def unsettled(low: jax.Array, high: jax.Array, num_low: jax.Array) -> jax.Array:
        return (num_low > limit) & (high - low > 1)

    def halve(state: Bounds) -> Bounds:
        middle = state[0] + (state[1] - state[0]) // 2
        return narrowed(state, middle, count_from(middle))

    def narrowed(state: Bounds, middle: jax.Array, num: jax.Array) -> Bounds:
        low, high, num_low = state
        going = unsettled(*state)
        up, down = going & (num >= k), going & (num < k)
        return (
            jnp.where(up, middle, low),
            jnp.where(down, middle, high),
            jnp.where(up, num, num_low),
        )

    state = (low, high, count_from(low))
    if tried is not None:
        state = narrowed(state, *tried)
    low, high, num_low = jax.lax.while_loop(lambda s: jnp.any(unsettled(*s)), halve, state)
    return low, high, num_low


def _narrow(bits: jax.Array, places: jax.Array, k: int, absent: int) -> jax.Array:
    """Of the candidates' places those of the k largest bits, in order; ``absent`` fills up."""

    def count_from(bound: jax.Array) -> jax.Array:
        return jnp.sum(bits >= bound[:, None], axis=1, dtype=jnp.int32)

    low, high, num_low = _halve(count_from, bits[:, 0], k, k, 1)
    above = bits >= jnp.where(num_low > k, high, low)[:, None]
    equal = (bits >= low[:, None]) & ~above
    missing = k - jnp.sum(above, axis=1, keepdims=True, dtype=jnp.int32)
    chosen = above | equal & (jnp.cumsum(equal, axis=1, dtype=jnp.int32) <= missing)
    slot = jnp.where(chosen, jnp.cumsum(chosen, axis=1, dtype=jnp.int32) - 1, k)
    rest = jnp.full((bits.shape[0], k), absent, jnp.int32)
    return jax.vmap(lambda r, s, p: r.at[s].set(p, mode="drop"))(rest, slot, places)
