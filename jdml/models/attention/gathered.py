"""Gathered keys: each device has its own queries and the keys and values of all positions.

One all-gather before the products, one reduce-scatter of the gradients after those of the backward
pass (which gathers the keys again instead of keeping them). The same bytes as the ring's, in one
exchange that nothing of the layer hides; keys and values are O(seq) on each device, which is little
where few key heads serve many queries. Scores and all else stay O(seq / K).

In zig-zag order device i's early queries meet i + 1 chunks of keys and its late ones 2K − i:
2K + 1 pairs of chunks for everyone. In contiguous order device i has i + 1/2 of K parts to do.

Reference: Llama Team, "The Llama 3 Herd of Models", 2024, section 3.3.2.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jdml.models.attention.blocks import (
    Pair,
    Pairs,
    all_pairs,
    attend_pairs,
    causal_pairs,
    finish,
    gradients_of_pairs,
    no_gradients,
    nothing_seen,
    save,
)
from jdml.models.attention.form import Form, Kept, grouped, ungrouped
from jdml.models.attention.order import chunk_places


@dataclass(frozen=True)
class Gathered(Form):
    """Sends, per layer, K − 1 times: the device's keys and values in their dtype, in each pass;
    and in the backward pass their gradients in float32."""

    def forward(self, query: jax.Array, key: jax.Array, value: jax.Array) -> Kept:
        """See ``Form``."""
        keys, values = self._gather(key, value)
        whole = grouped(query, key.shape[1])
        size = self.block_of(query.shape[2])
        pairs = self._pairs(query.shape[2], size)
        summed = attend_pairs(nothing_seen(whole), whole, keys, values, pairs, size, self.causal)
        output, log_sum = (ungrouped(x) for x in finish(summed, query.dtype))
        return Kept(query, key, value, output, log_sum)

    def backward(self, kept: Kept, gradient: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """See ``Form``."""
        query, key, value, output, log_sum = kept
        size = self.block_of(query.shape[2])
        pairs = self._pairs(query.shape[2], size)
        keys, values = self._gather(key, value)
        saved = save(*(grouped(x, key.shape[1]) for x in (query, output, log_sum, gradient)))
        zeros = no_gradients(saved.query, keys)
        of_query, *of_pair = gradients_of_pairs(
            zeros, saved, keys, values, pairs, size, self.causal
        )
        of_key, of_value = jnp.stack(of_pair)
        if self.axis_size > 1:
            of_key, of_value = jax.lax.psum_scatter(
                jnp.stack(of_pair), self.axis, scatter_dimension=3, tiled=True
            )
        return (
            ungrouped(of_query).astype(query.dtype),
            of_key.astype(key.dtype),
            of_value.astype(value.dtype),
        )

    def _gather(self, key: jax.Array, value: jax.Array) -> jax.Array:
        """[2, batch, kv_heads, seq, head_dim], parts in the devices' order."""
        pair = jnp.stack([key, value])
        if self.axis_size == 1:
            return pair
        return jax.lax.all_gather(pair, self.axis, axis=3, tiled=True)

    def _pairs(self, length: int, size: int) -> Pairs:
        """Which of a device's ``length`` queries meet which of all keys."""
        if not self.causal:
            return all_pairs(length, length * self.axis_size, size)
        own = causal_pairs(length, size)
        if self.axis_size == 1:
            return own
        device = jax.lax.axis_index(self.axis)
        if self.order == "contiguous":
            # Its own part first, then those before it: how many, the device's number says.
            square = all_pairs(length, length, size)

            def pair_of_parts(number: Any) -> Pair:
                is_own = number < own.count
                before = (number - own.count) // square.count
                part = jnp.where(is_own, device, before)
                within = jax.tree.map(
                    partial(jnp.where, is_own),
                    own.pair(number),
                    square.pair((number - own.count) % square.count),
                )
                # An earlier part is visible as a whole: any distance beyond a block will do.
                distance = jnp.where(is_own, within.distance, length)
                return Pair(within.queries, within.keys + part * length, distance)

            return Pairs(own.count + device * square.count, pair_of_parts)
        chunk, last = length // 2, 2 * self.axis_size - 1
        square = all_pairs(chunk, chunk, size)
        places = jnp.asarray(chunk_places(self.axis_size, self.order))

        def pair_of_chunks(number: Any) -> Pair:
            number, within = number // square.count, square.pair(number % square.count)
            is_early = number <= device
            query = jnp.where(is_early, device, last - device)  # numbers of chunks of the text
            key = jnp.where(is_early, number, number - device - 1)
            return Pair(
                jnp.where(is_early, 0, chunk) + within.queries,
                places[key] * chunk + within.keys,
                (query - key) * chunk + within.queries - within.keys,
            )

        return Pairs((last + 2) * square.count, pair_of_chunks)
