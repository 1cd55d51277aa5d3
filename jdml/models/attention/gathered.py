"""Gathered keys: each device has its own queries and sees the keys and values of all positions.

Pieces of them (``pieces.py``) are gathered, and their gradients, in the backward pass, which
gathers the keys again instead of keeping them, reduced and scattered. The same bytes as the ring's.

In zig-zag order device i's early queries meet i earlier chunks of keys and its late ones
2K − 1 − i, and each their own: the same for everyone. In contiguous order device i has i + 1/2 of K
parts to do.

Reference: Llama Team, "The Llama 3 Herd of Models", 2024, section 3.3.2.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jdml.models.attention.blocks import finish, save
from jdml.models.attention.form import Kept, grouped, ungrouped
from jdml.models.attention.order import chunk_places
from jdml.models.attention.pieces import InPieces, Meeting


@dataclass(frozen=True)
class Gathered(InPieces):
    """Sends, per layer, K − 1 times: the device's keys and values in their dtype, in each pass;
    and in the backward pass their gradients in float32."""

    def forward(self, query: jax.Array, key: jax.Array, value: jax.Array) -> Kept:
        """See ``Form``."""
        summed = self.attend(grouped(query, key.shape[1]), key, value)
        output, log_sum = (ungrouped(x) for x in finish(summed, query.dtype))
        return Kept(query, key, value, output, log_sum)

    def backward(self, kept: Kept, gradient: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """See ``Form``."""
        query, key, value, output, log_sum = kept
        saved = save(*(grouped(x, key.shape[1]) for x in (query, output, log_sum, gradient)))
        of_query, of_key, of_value = self.gradients(saved, key, value)
        return ungrouped(of_query).astype(query.dtype), of_key, of_value

    def fetch(self, pair: jax.Array) -> jax.Array:
        """See ``InPieces``."""
        if self.axis_size == 1:
            return pair
        return jax.lax.all_gather(pair, self.axis, axis=3, tiled=True)

    def hand_back(self, pair: jax.Array, like: jax.Array) -> jax.Array:
        """See ``InPieces``."""
        if self.axis_size > 1:
            pair = jax.lax.psum_scatter(pair, self.axis, scatter_dimension=3, tiled=True)
        return pair.astype(like.dtype)

    def meeting(self) -> Meeting:
        """See ``InPieces``."""
        k = self.axis_size
        device = jax.lax.axis_index(self.axis) if k > 1 else 0
        chunks = 2 if self.order == "zigzag" and k > 1 else 1
        if not self.causal:
            every = chunks * chunks * k
            return Meeting(0, _first, every, lambda i: (i // (chunks * k), i % (chunks * k)))
        if chunks == 1:
            return Meeting(1, lambda i: (0 * i, device + 0 * i), device, lambda i: (0 * i, i))
        places = jnp.asarray(chunk_places(k, self.order))

        def earlier(i: Any) -> tuple[Any, Any]:
            is_late = i >= device
            return is_late.astype(i.dtype), places[jnp.where(is_late, i - device, i)]

        return Meeting(1, lambda i: (0 * i, 2 * device + 0 * i), 2 * k - 1, earlier)


def _first(i: Any) -> tuple[Any, Any]:
    return 0 * i, 0 * i
