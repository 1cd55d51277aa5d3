"""Ring attention: keys and values go round, and meet each device's queries.

In round r device i has the keys of device i − r and adds them to its queries' running sums, while
the next keys travel. The backward pass sends the keys round again, and their gradients one round
behind them: every device adds its part, and they reach home complete. Nothing of length seq is ever
on one device: memory is O(seq / K).

Causal attention in zig-zag order (``order.py``) is half of the products of two whole parts, the
same half on every device: chunks of c positions, queries (early, late), keys (early, late):

- own keys (round 0): what a causal mask leaves of 2c × 2c;
- keys of an earlier device: both queries see the early keys, and no query the late ones;
- keys of a later device: the late queries see both, the early ones neither.

Late queries meet early keys in either case; besides, early queries meet early keys, or late ones
late ones. So a round is two c × c products without a mask, at places that the device's number
decides. In contiguous order a device skips the rounds that causality rules out, and the others
wait for the last device, which has none to skip.

References: Liu, Zaharia and Abbeel, "Ring Attention with Blockwise Transformers for Near-Infinite
Context", 2023; zig-zag order: Brandon et al., "Striped Attention", 2023 (its problem), and Llama
Team, "The Llama 3 Herd of Models", 2024 (this order).
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jdml.models.attention.blocks import (
    Pair,
    Pairs,
    Summed,
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


@dataclass(frozen=True)
class Ring(Form):
    """Sends, per layer, K − 1 times: the device's keys and values in their dtype, in each pass;
    and in the backward pass their gradients in float32."""

    def forward(self, query: jax.Array, key: jax.Array, value: jax.Array) -> Kept:
        """See ``Form``."""
        queries, length, last = grouped(query, key.shape[1]), query.shape[2], self.axis_size - 1
        size = self.block_of(length)

        def attend(summed: Summed, held: jax.Array, pairs: Pairs, causal: bool) -> Summed:
            return attend_pairs(summed, queries, held[0], held[1], pairs, size, causal)

        def round_of(number: Any, carry: Any) -> Any:
            summed, held = carry
            arriving = self._send(held)
            return attend(summed, held, self._pairs_of_round(number, length, size), False), arriving

        held = jnp.stack([key, value])
        arriving = self._send(held) if last else held
        summed = attend(nothing_seen(queries), held, self._own_pairs(length, size), self.causal)
        if last:
            summed, held = jax.lax.fori_loop(1, last, round_of, (summed, arriving))
            summed = attend(summed, held, self._pairs_of_round(last, length, size), False)
        output, log_sum = (ungrouped(x) for x in finish(summed, query.dtype))
        return Kept(query, key, value, output, log_sum)

    def backward(self, kept: Kept, gradient: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """See ``Form``."""
        query, key, value, output, log_sum = kept
        length, last = query.shape[2], self.axis_size - 1
        size = self.block_of(length)
        saved = save(*(grouped(x, key.shape[1]) for x in (query, output, log_sum, gradient)))
        zeros = no_gradients(saved.query, key)

        def add(of_query: jax.Array, held: jax.Array, pairs: Pairs, causal: bool) -> Any:
            """The query's gradient with that through these pairs, and the gradient of ``held``."""
            start = zeros._replace(query=of_query)
            of_query, *of_held = gradients_of_pairs(
                start, saved, held[0], held[1], pairs, size, causal
            )
            return of_query, jnp.stack(of_held)

        def round_of(number: Any, carry: Any) -> Any:
            of_query, held, travelling = carry
            arriving, so_far = self._send(held), self._send(travelling)
            pairs = self._pairs_of_round(number, length, size)
            of_query, of_held = add(of_query, held, pairs, False)
            return of_query, arriving, so_far + of_held

        own, of_query, home = jnp.stack([key, value]), zeros.query, None
        if last:
            # A key's gradient sets out from the first device that its key visits: K − 1 hops home.
            first = self._send(own)
            held = self._send(first) if last > 1 else first
            pairs = self._pairs_of_round(1, length, size)
            of_query, travelling = add(of_query, first, pairs, False)
            if last > 1:
                of_query, held, travelling = jax.lax.fori_loop(
                    2, last, round_of, (of_query, held, travelling)
                )
                so_far = self._send(travelling)
                pairs = self._pairs_of_round(last, length, size)
                of_query, of_held = add(of_query, held, pairs, False)
                travelling = so_far + of_held
            home = self._send(travelling)
        # Its own keys last, while their gradients are on the way home.
        of_query, of_own = add(of_query, own, self._own_pairs(length, size), self.causal)
        of_own = of_own if home is None else home + of_own
        of_key, of_value = of_own.astype(key.dtype)
        return ungrouped(of_query).astype(query.dtype), of_key, of_value

    def _send(self, x: jax.Array) -> jax.Array:
        k = self.axis_size
        return jax.lax.ppermute(x, self.axis, [(i, (i + 1) % k) for i in range(k)])

    def _own_pairs(self, length: int, size: int) -> Pairs:
        # The order of a device's own positions is that of the text, zig-zag or not.
        return causal_pairs(length, size) if self.causal else all_pairs(length, length, size)

    def _pairs_of_round(self, number: Any, length: int, size: int) -> Pairs:
        if not self.causal:
            return all_pairs(length, length, size)
        is_earlier = number <= jax.lax.axis_index(self.axis)  # the device that the keys are of
        if self.order == "contiguous":
            count, pair = all_pairs(length, length, size)
            return Pairs(jnp.where(is_earlier, count, 0), pair)
        chunk = length // 2
        square = all_pairs(chunk, chunk, size)
        at = jnp.where(is_earlier, 0, chunk)

        def pair_of_halves(number: Any) -> Pair:
            queries, keys, _ = square.pair(number % square.count)
            is_common = number < square.count  # late queries, early keys
            return Pair(
                queries + jnp.where(is_common, chunk, at), keys + jnp.where(is_common, 0, at), 0
            )

        return Pairs(2 * square.count, pair_of_halves)
