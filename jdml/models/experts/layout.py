"""How the rules in force divide a mixture of experts, checked before anything is traced."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdml.sharding import Without
from jdml.sharding.region import axes_of_name, num_parts_of_name

TOKENS: tuple[Any, ...] = ("batch", Without("seq", "mlp"), None)
"""Names of the dims of tokens inside: positions whole where their axis divides the hidden units."""


class Layout(NamedTuple):
    """Mesh axes inside the layer.

    ``num_experts``: E; ``axes``, ``num_parts``: the axes that divide the experts, into how many
    parts; ``hidden_axes``: those that divide each expert's hidden units.
    """

    num_experts: int
    axes: tuple[str, ...]
    num_parts: int
    hidden_axes: tuple[str, ...]

    def enter(self, x: jax.Array) -> jax.Array:
        """Tokens, whose gradient is summed over the parts of the hidden units here, once."""
        return jax.lax.pcast(x, self.hidden_axes, to="varying") if self.hidden_axes else x

    def leave(self, x: jax.Array) -> jax.Array:
        """The results of all parts of the hidden units, summed.

        After they were weighted and added up, for a token has k of them.
        """
        return jax.lax.psum(x, self.hidden_axes) if self.hidden_axes else x


def layout_of(num_experts: int, whole_sequences: bool = False) -> Layout:
    """The layout of a layer's experts.

    Args:
      num_experts: E.
      whole_sequences: refuse axes that divide the sequence.

    Raises:
      ValueError: see ``evaluate_with_capacity``.
    """
    axes, parts = axes_of_name("experts"), num_parts_of_name("experts")
    over = " × ".join(map(repr, axes))
    if num_experts % parts:
        below, above = num_experts // parts * parts, -(-num_experts // parts) * parts
        nearest = f"{below} or {above}" if below else str(above)
        divisors = [n for n in range(1, num_experts + 1) if num_experts % n == 0]
        raise ValueError(
            f"{num_experts} experts are to be divided over mesh axis {over} of size {parts}; the "
            f"nearest numbers of experts that it divides: {nearest}; sizes of the axis that divide "
            f"{num_experts}: {', '.join(map(str, divisors))}"
        )
    sequence = axes_of_name(Without("seq", "mlp"))
    tokens = (*axes_of_name("batch"), *sequence)
    if not set(axes) <= set(tokens):
        raise ValueError(
            f"mesh axis {over} divides the experts but not the tokens (batch and seq are divided "
            f"over {tokens}), so that its devices would all compute the same; let it divide the "
            "batch too: jdml.sharding.presets.expert_parallel does"
        )
    if whole_sequences and sequence:
        raise ValueError(
            f"a capacity counts the tokens of a sequence, which mesh axes {sequence} divide; take "
            "capacity_factor=None (dropless), or leave seq whole"
        )
    return Layout(num_experts, axes, parts, axes_of_name("mlp"))


def weighted(found: jax.Array, weights: jax.Array) -> jax.Array:
    """``Σ_k weight_k · found_k`` in float32: [tokens, k, embed], [tokens, k] → [tokens, embed]."""
    return jnp.sum(found.astype(jnp.float32) * weights[..., None], axis=1)
