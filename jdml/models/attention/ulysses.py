"""All-to-all attention: heads against positions.

Before the products each device trades its positions of the other devices' heads for all positions
of its own heads; after them it trades back. In between, attention is that of one device with
1/K of the heads. So the axis may not be longer than there are query heads to divide.

Queries are traded whole, keys and values piece by piece (``pieces.py``). Where the axis does not
divide the key heads, those of a piece are repeated to the least common multiple of the two, and no
further: a device then receives just the key heads that its queries use.

Reference: Jacobs et al., "DeepSpeed Ulysses", 2023.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jdml.models.attention.blocks import Saved, finish, slope
from jdml.models.attention.form import Kept, grouped, repeat_heads, sum_heads, ungrouped
from jdml.models.attention.order import chunk_places
from jdml.models.attention.pieces import InPieces, Meeting
from jdml.sharding.fit import axes_of
from jdml.sharding.rules import entry_of


@dataclass(frozen=True)
class Ulysses(InPieces):
    """Sends, per layer, (K − 1) / K of the device's queries and outputs and, in the backward pass,
    of their gradients (and one float32 for each query and head); and in each pass of its keys and
    values, and of their gradients in one. Key heads that are repeated as above count as often.

    What is kept has all positions of a device's query heads.
    """

    def forward(self, query: jax.Array, key: jax.Array, value: jax.Array) -> Kept:
        """See ``Form``."""
        query = self._to_heads(query)
        summed = self.attend(grouped(query, self._kv_heads(key)), key, value)
        output, log_sum = (ungrouped(x) for x in finish(summed, query.dtype))
        return Kept(query, key, value, self._to_positions(output), log_sum)

    def backward(self, kept: Kept, gradient: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """See ``Form``."""
        query, key, value, output, log_sum = kept
        traded = (
            self._to_heads(gradient),
            self._to_heads(slope(output, gradient)[..., None])[..., 0],
        )
        groups = (grouped(x, self._kv_heads(key)) for x in (query, traded[0], log_sum, traded[1]))
        of_query, of_key, of_value = self.gradients(Saved(*groups), key, value)
        return self._to_positions(ungrouped(of_query).astype(query.dtype)), of_key, of_value

    def kept_specs(self, spec: Any) -> Kept:
        """See ``Form``."""
        batch, heads, seq, _ = spec
        heads = entry_of((*axes_of(heads), *axes_of(seq)))
        by_heads: Any = P(batch, heads, None, None)
        of_log_sum: Any = P(batch, heads, None)
        return Kept(by_heads, spec, spec, spec, of_log_sum)

    def fetch(self, pair: jax.Array) -> jax.Array:
        """See ``InPieces``."""
        return self._to_heads(repeat_heads(pair, self._repeats(pair.shape[2])))

    def hand_back(self, pair: jax.Array, like: jax.Array) -> jax.Array:
        """See ``InPieces``."""
        back = self._to_positions(pair.astype(like.dtype))
        return sum_heads(back, self._repeats(like.shape[1]))

    def meeting(self) -> Meeting:
        """See ``InPieces``."""
        places = chunk_places(self.axis_size, self.order)
        n = len(places)
        if not self.causal:
            return Meeting(0, lambda i: (i, i), n * n, lambda i: (i // n, i % n))

        def earlier(i: Any) -> tuple[Any, Any]:
            # Rows of 1 … n − 1 earlier chunks, the first joined with the last: n each.
            row, column = i // n, i % n
            is_first = column <= row
            query = jnp.where(is_first, row, n - 2 - row) + 1
            key = jnp.where(is_first, column, column - row - 1)
            return jnp.asarray(places)[query], jnp.asarray(places)[key]

        chunks = n // self.axis_size
        own = lambda i: (i * chunks, i * chunks)  # noqa: E731
        return Meeting(self.axis_size, own, n * (n - 1) // 2, earlier)

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

    def _repeats(self, kv_heads: int) -> int:
        """How often each key head is sent, so that every device's queries get theirs."""
        return math.lcm(kv_heads, self.axis_size) // kv_heads

    def _kv_heads(self, key: jax.Array) -> int:
        """Key heads of a device, once they are traded."""
        return math.lcm(key.shape[1], self.axis_size) // self.axis_size

    def _to_heads(self, x: jax.Array) -> jax.Array:
        """[..., heads, seq / K, head_dim] → [..., heads / K, seq, head_dim]."""
        return self._exchange(x, x.ndim - 3, x.ndim - 2)

    def _to_positions(self, x: jax.Array) -> jax.Array:
        """[..., heads / K, seq, head_dim] → [..., heads, seq / K, head_dim]."""
        return self._exchange(x, x.ndim - 2, x.ndim - 3)

    def _exchange(self, x: jax.Array, split: int, join: int) -> jax.Array:
        if self.axis_size == 1:
            return x
        return jax.lax.all_to_all(x, self.axis, split, join, tiled=True)
