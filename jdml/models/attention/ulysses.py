"""All-to-all attention: heads against positions.

Before the products each device trades its positions of the other devices' heads for all positions
of its own heads; after them it trades back. In between, attention is that of one device with
1/K of the heads. So the axis may not be longer than there are query heads to divide.

Where the axis does not divide the key heads, they are repeated to the least common multiple of the
two, and no further: a device then receives just the key heads that its queries use.

Reference: Jacobs et al., "DeepSpeed Ulysses", 2023.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jdml.models.attention.blocks import (
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
from jdml.sharding.fit import axes_of
from jdml.sharding.rules import entry_of


@dataclass(frozen=True)
class Ulysses(Form):
    """Sends, per layer, (K − 1) / K of the device's queries, keys, values and outputs; and of their
    gradients in the backward pass. Key heads that are repeated as above count as often.

    What is kept has all positions of a device's heads.
    """

    divides_heads = True

    def forward(self, query: jax.Array, key: jax.Array, value: jax.Array) -> Kept:
        """See ``Form``."""
        query = self._to_heads(query)
        key, value = self._to_heads(jnp.stack([key, value]))
        whole, size = grouped(query, key.shape[1]), self.block_of(query.shape[2] // self.axis_size)
        pairs = self._pairs(query.shape[2], size)
        summed = attend_pairs(nothing_seen(whole), whole, key, value, pairs, size, self.causal)
        output, log_sum = (ungrouped(x) for x in finish(summed, query.dtype))
        return Kept(query, key, value, output, log_sum)

    def backward(self, kept: Kept, gradient: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """See ``Form``."""
        query, key, value, output, log_sum = kept
        gradient = self._to_heads(gradient)
        size = self.block_of(query.shape[2] // self.axis_size)
        pairs = self._pairs(query.shape[2], size)
        saved = save(*(grouped(x, key.shape[1]) for x in (query, output, log_sum, gradient)))
        zeros = no_gradients(saved.query, key)
        of_query, *of_pair = gradients_of_pairs(zeros, saved, key, value, pairs, size, self.causal)
        of_key, of_value = self.to_positions(jnp.stack(of_pair).astype(key.dtype))
        return self.to_positions(ungrouped(of_query).astype(query.dtype)), of_key, of_value

    def to_positions(self, x: jax.Array) -> jax.Array:
        """[..., heads / K, seq, head_dim] → [..., heads, seq / K, head_dim]."""
        return self._exchange(x, x.ndim - 2, x.ndim - 3)

    def kept_specs(self, spec: Any) -> Kept:
        """See ``Form``."""
        batch, heads, seq, _ = spec
        heads = entry_of((*axes_of(heads), *axes_of(seq)))
        return super().kept_specs(P(batch, heads, None, None))

    def check(self, heads: int, length: int) -> None:
        """See ``Form``."""
        super().check(heads, length)
        k = self.axis_size
        if heads % k:
            below, above = heads // k * k, -(-heads // k) * k
            raise ValueError(
                f"attention='ulysses' divides the query heads of a device over axis {self.axis!r} "
                f"of size {k}, which does not divide {heads}; the nearest numbers of heads are "
                f"{f'{below} and {above}' if below else above}, or take attention='ring', which "
                "leaves heads alone"
            )

    def repeats(self, kv_heads: int) -> int:
        """See ``Form``."""
        return math.lcm(kv_heads, self.axis_size) // kv_heads

    def _to_heads(self, x: jax.Array) -> jax.Array:
        """[..., heads, seq / K, head_dim] → [..., heads / K, seq, head_dim]."""
        return self._exchange(x, x.ndim - 3, x.ndim - 2)

    def _exchange(self, x: jax.Array, split: int, join: int) -> jax.Array:
        if self.axis_size == 1:
            return x
        return jax.lax.all_to_all(x, self.axis, split, join, tiled=True)

    def _pairs(self, length: int, size: int) -> Pairs:
        if not self.causal:
            return all_pairs(length, length, size)
        if self.axis_size == 1:
            return causal_pairs(length, size)
        # Positions arrive in the devices' order.
        return causal_pairs(length, size, chunk_places(self.axis_size, self.order))
