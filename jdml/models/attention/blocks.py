"""Softmax attention block by block: scores of one block of queries and one of keys at a time.

All forms of attention here are a list of *pairs*: which block of queries meets which block of
keys. One loop walks through it and keeps, for each query, the largest score so far, the sum of
``exp(score − peak)`` and the same sum weighted by the values; a larger score shrinks what was
summed before. The backward pass walks through the same list and computes the scores again. So
[seq, seq] scores are never there, and blocks that causality rules out are never computed: they
are not in the list, which is itself no array but a formula.

Arrays are [batch, kv_heads, ...]: the ``group`` query heads that share a key head are a dim of
their own, and keys are never repeated.

References: Milakov & Gimelshein, "Online normalizer calculation for softmax", 2018; Rabe &
Staats, "Self-attention does not need O(n²) memory", 2021; Dao et al., "FlashAttention", 2022.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

_T = TypeVar("_T")
_LOWEST = jnp.finfo(jnp.float32).min
_SEQ = 3  # of queries [batch, kv_heads, group, seq, head_dim]; keys have theirs one earlier


class Pair(NamedTuple):
    """Where the block of queries starts, where that of keys does, and how many positions of the
    text lie between the first key and the first query (only a causal mask looks at that)."""

    queries: Any
    keys: Any
    distance: Any


class Pairs(NamedTuple):
    """Blocks of queries and the blocks of keys that they meet.

    ``count``: how many, an int, or an int32 scalar that may differ from device to device.
    ``pair``: from the number of a pair, int32 0 … count − 1, to the pair.
    """

    count: Any
    pair: Callable[[Any], Pair]


class Summed(NamedTuple):
    """What was seen of the keys so far, float32: a query's ``mixed / total`` is its output.

    ``mixed`` [batch, kv_heads, group, seq, head_dim]; ``total`` and ``peak`` without the last dim.
    """

    mixed: jax.Array
    total: jax.Array
    peak: jax.Array


class Saved(NamedTuple):
    """What the backward pass needs to know of the queries besides the keys.

    ``query`` and ``gradient`` (of the output): [batch, kv_heads, group, seq, head_dim];
    ``log_sum`` (of exponentials of the scores) and ``slope`` (``sum(output · gradient)``):
    float32 without the last dim.
    """

    query: jax.Array
    gradient: jax.Array
    log_sum: jax.Array
    slope: jax.Array


class Gradients(NamedTuple):
    """float32, shaped like the query, the key and the value."""

    query: jax.Array
    key: jax.Array
    value: jax.Array


def block_size(length: int, limit: int) -> int:
    """The largest divisor of ``length`` up to ``limit``.

    Raises:
      ValueError: ``limit`` is below 1, or no divisor is near it: blocks of a few positions would
        be very slow.
    """
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise ValueError(f"block must be a positive integer, got {limit!r}")
    best = max(size for size in range(1, min(length, limit) + 1) if length % size == 0)
    if best < length and best < limit // 8:
        below, above = length // limit * limit, -(-length // limit) * limit
        raise ValueError(
            f"attention in blocks of up to {limit} positions: {length}, which a device holds in "
            f"one chunk, has no divisor from {-(-limit // 8)} to {limit}; the nearest multiples of "
            f"{limit} are {below} and {above}; or pass another block"
        )
    return best


def all_pairs(num_queries: int, num_keys: int, block: int) -> Pairs:
    """Every block of ``num_queries`` positions with every block of ``num_keys``."""
    across = num_keys // block

    def pair(number: Any) -> Pair:
        return Pair(number // across * block, number % across * block, 0)

    return Pairs(num_queries // block * across, pair)


def causal_pairs(length: int, block: int) -> Pairs:
    """Each block of the text with itself and the earlier ones.

    Row r of the triangle has r + 1 blocks and row n − 1 − r has n − r: n + 1 together, so that
    counting through n / 2 such joined rows needs no table.

    Args:
      length: positions.
      block: divides ``length``.
    """
    blocks = length // block

    def pair(number: Any) -> Pair:
        row, column = number // (blocks + 1), number % (blocks + 1)
        is_first = column <= row
        query = jnp.where(is_first, row, blocks - 1 - row)
        key = jnp.where(is_first, column, column - row - 1)
        return Pair(query * block, key * block, (query - key) * block)

    return Pairs(blocks * (blocks + 1) // 2, pair)


def nothing_seen(query: jax.Array) -> Summed:
    """The sums before the first key; ``query`` [batch, kv_heads, group, seq, head_dim]."""
    mixed = jnp.zeros_like(query, jnp.float32)
    total = mixed[..., 0]
    return Summed(mixed, total, jnp.full_like(total, _LOWEST))


def attend_pairs(
    summed: Summed,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    pairs: Pairs,
    block: int,
    causal: bool,
) -> Summed:
    """The sums after these pairs, too.

    Args:
      summed: what earlier calls returned, or ``nothing_seen``.
      query: [batch, kv_heads, group, seq, head_dim].
      key, value: [batch, kv_heads, keys, head_dim].
      pairs: what meets what. The first block that a query meets must hold a key that it may see.
      block: positions of a block, of queries and of keys.
      causal: mask keys after the query; otherwise distances are not looked at.
    """

    def add(number: jax.Array, summed: Summed) -> Summed:
        at, keys_at, distance = pairs.pair(number)
        q = _slice(query, at, block)
        k, v = (_slice(x, keys_at, block, _SEQ - 1) for x in (key, value))
        scores = _scores(q, k)
        if causal:
            # The lowest number and not −inf, whose difference with itself is NaN.
            scores = jnp.where(_visible(block, distance), scores, _LOWEST)
        before = Summed(*(_slice(x, at, block) for x in summed))
        peak = jnp.maximum(before.peak, scores.max(axis=-1))
        shrink = jnp.exp(before.peak - peak)
        weights = jnp.exp(scores - peak[..., None])
        mixed = _product("bkgts,bksd->bkgtd", weights.astype(v.dtype), v)
        after = Summed(
            before.mixed * shrink[..., None] + mixed,
            before.total * shrink + weights.sum(axis=-1),
            peak,
        )
        return Summed(*(_put(x, new, at) for x, new in zip(summed, after, strict=True)))

    return _walk(pairs.count, add, summed)


def finish(summed: Summed, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """The output in ``dtype``, and the logarithm of the sum of exponentials, float32."""
    output = summed.mixed / summed.total[..., None]
    return output.astype(dtype), summed.peak + jnp.log(summed.total)


def no_gradients(query: jax.Array, key: jax.Array) -> Gradients:
    """Zeros."""
    of_key = jnp.zeros_like(key, jnp.float32)
    return Gradients(jnp.zeros_like(query, jnp.float32), of_key, of_key)


def save(query: jax.Array, output: jax.Array, log_sum: jax.Array, gradient: jax.Array) -> Saved:
    """What ``gradients_of_pairs`` needs, of the forward pass's results and their gradient."""
    return Saved(query, gradient, log_sum, slope(output, gradient))


def slope(output: jax.Array, gradient: jax.Array) -> jax.Array:
    """``sum(output · gradient)`` over the last dim, float32."""
    return jnp.sum(output.astype(jnp.float32) * gradient.astype(jnp.float32), axis=-1)


def gradients_of_pairs(
    gradients: Gradients,
    saved: Saved,
    key: jax.Array,
    value: jax.Array,
    pairs: Pairs,
    block: int,
    causal: bool,
) -> Gradients:
    """The gradients with those through these pairs added; arguments as of ``attend_pairs``.

    With weights ``p = exp(score − log_sum)`` and the output's gradient ``g``: ``dv += pᵀ g``,
    ``ds = p (g vᵀ − slope)``, ``dq += ds k / sqrt(d)``, ``dk += dsᵀ q / sqrt(d)``.
    """

    def add(number: jax.Array, gradients: Gradients) -> Gradients:
        at, keys_at, distance = pairs.pair(number)
        q, g, log_sum, slope = (_slice(x, at, block) for x in saved)
        k, v = (_slice(x, keys_at, block, _SEQ - 1) for x in (key, value))
        weights = jnp.exp(_scores(q, k) - log_sum[..., None])
        if causal:
            weights = jnp.where(_visible(block, distance), weights, 0.0)
        of_scores = weights * (_product("bkgtd,bksd->bkgts", g, v) - slope[..., None])
        of_scores = (of_scores * q.shape[-1] ** -0.5).astype(q.dtype)
        new = Gradients(
            _product("bkgts,bksd->bkgtd", of_scores, k),
            _product("bkgts,bkgtd->bksd", of_scores, q),
            _product("bkgts,bkgtd->bksd", weights.astype(g.dtype), g),
        )
        return Gradients(
            _add(gradients.query, new.query, at),
            _add(gradients.key, new.key, keys_at, _SEQ - 1),
            _add(gradients.value, new.value, keys_at, _SEQ - 1),
        )

    return _walk(pairs.count, add, gradients)


def _walk(count: Any, add: Callable[[jax.Array, _T], _T], start: _T) -> _T:
    """``jax.lax.fori_loop(0, count, add, start)``, never as a scan.

    A scan whose numbers are known and whose arrays are not is split by JAX in two where it is
    differentiated or checkpointed within the layers' scan: the first, outside the layers, would
    keep the masks of all pairs, [count, batch, kv_heads, group, block, block].
    """

    def turn(carry: tuple[jax.Array, _T]) -> tuple[jax.Array, _T]:
        return carry[0] + 1, add(*carry)

    return jax.lax.while_loop(lambda carry: carry[0] < count, turn, (jnp.int32(0), start))[1]


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    return _product("bkgtd,bksd->bkgts", q, k) * q.shape[-1] ** -0.5


def _visible(block: int, distance: jax.Array) -> jax.Array:
    number = jnp.arange(block)
    return distance + number[:, None] >= number[None, :]


def _product(formula: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(formula, x, y, preferred_element_type=jnp.float32)


def _slice(x: jax.Array, start: jax.Array, size: int, dim: int = _SEQ) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size, dim)


def _put(x: jax.Array, part: jax.Array, start: jax.Array, dim: int = _SEQ) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part, start, dim)


def _add(x: jax.Array, part: jax.Array, start: jax.Array, dim: int = _SEQ) -> jax.Array:
    return _put(x, _slice(x, start, part.shape[dim], dim) + part, start, dim)
