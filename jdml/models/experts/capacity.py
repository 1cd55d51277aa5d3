"""Experts with room for so many tokens of each sequence, and no more.

Every expert has ``C = ⌈capacity_factor · k · seq / E⌉`` places for the tokens of a sequence, filled
in order: all tokens' first choices, then all second ones, each from the start of the sequence. A
choice that finds no room is dropped: it adds nothing, and the residual carries the token on.
Counted within a sequence, what is dropped does not depend on the other sequences of the batch nor
on how a mesh divides them. All shapes are static, so that the products are plain batched ones.
It does depend on later tokens: their first choices go before a token's second one. A token that
is decoded alone always finds room.

With the experts divided over an axis of n devices, each sends the places of another's experts to
it, filled or not, and gets the results back: two all-to-alls forward and two in the backward pass,
each of ``E · batch · C · embed`` values of a device (``batch``: its sequences), of which it sends
(n − 1) / n.

References: Lepikhin et al., "GShard", 2020; Fedus et al., "Switch Transformers", 2021.
"""

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jdml.models.experts.kernels import Kernels, activation, names_of, present, restored
from jdml.models.experts.layout import TOKENS, Layout, layout_of, weighted
from jdml.models.experts.routing import Routing
from jdml.models.experts.rows import collect, places_of, spread
from jdml.sharding.region import manual


def capacity_of(capacity_factor: float, num_choices: int, seq: int, num_experts: int) -> int:
    """Places of an expert for a sequence: ``⌈capacity_factor · k · seq / E⌉``, at most ``seq``."""
    return min(seq, math.ceil(capacity_factor * num_choices * seq / num_experts))


def places(experts: jax.Array, num_experts: int, capacity: int) -> jax.Array:
    """The place of each choice at its expert, int32 [batch, seq, k]; −1 where it is dropped.

    Args:
      experts: int32 [batch, seq, k], the k of a token being different experts.
      num_experts: E.
      capacity: places of an expert for a sequence.
    """
    batch, seq, choices = experts.shape
    in_turn = experts.swapaxes(1, 2).reshape(batch, choices * seq)
    chosen = (in_turn[..., None] == jnp.arange(num_experts)).astype(jnp.int32)
    earlier = jnp.sum(chosen * (jnp.cumsum(chosen, axis=1) - 1), axis=-1)
    earlier = earlier.reshape(batch, choices, seq).swapaxes(1, 2)
    return jnp.where(earlier < capacity, earlier, -1)


def evaluate_with_capacity(
    x: jax.Array, routing: Routing, kernels: Kernels, place: jax.Array, capacity: int
) -> jax.Array:
    """``evaluate_densely`` of the choices that have a place, to rounding, at their cost alone.

    Call inside ``use_rules`` or ``no_mesh``; the axis of the name ``experts`` divides the experts.

    Args:
      x: [batch, seq, embed].
      routing: of the same tokens.
      kernels: of all experts, in the dtype of ``x``.
      place: from ``places``.
      capacity: as ``places`` was given it.

    Raises:
      ValueError: experts that their axis does not divide, an axis of experts that does not divide
        the batch, or one that divides the sequence (a place is counted within all of it).
    """
    layout = layout_of(kernels.up.shape[0], whole_sequences=True)

    def on_device(
        x: jax.Array, experts: jax.Array, weights: jax.Array, place: jax.Array, *arrays: jax.Array
    ) -> jax.Array:
        return _on_device(
            layout, capacity, layout.enter(x), experts, weights, place, restored(arrays)
        )

    region = manual(on_device, [TOKENS] * 4 + names_of(kernels), TOKENS)
    return region(x, routing.experts, routing.weights, place, *present(kernels))


def _on_device(
    layout: Layout,
    capacity: int,
    x: jax.Array,
    experts: jax.Array,
    weights: jax.Array,
    place: jax.Array,
    kernels: Kernels,
) -> jax.Array:
    batch, seq, embed = x.shape
    num_places = layout.num_experts * batch * capacity
    sequence = jnp.arange(batch, dtype=jnp.int32)[:, None, None]
    target = (experts * batch + sequence) * capacity + place
    target = jnp.where(place < 0, num_places, target).reshape(batch * seq, -1)
    moved = places_of(target, num_places)
    buffers = spread(x.reshape(-1, embed), moved).reshape(layout.num_experts, -1, embed)
    if layout.axes:
        # [E, batch · C, embed] → [E / n, n · batch · C, embed]: all devices' tokens, own experts
        buffers = jax.lax.all_to_all(buffers, layout.axes, 0, 1, tiled=True)
        buffers = checkpoint_name(buffers, "experts.exchanged")
    hidden = jnp.einsum("erd,edf->erf", buffers, kernels.up)
    hidden = checkpoint_name(hidden, "experts.product")
    gate = None
    if kernels.gate is not None:
        gate = jnp.einsum("erd,edf->erf", buffers, kernels.gate)
        gate = checkpoint_name(gate, "experts.product")
    buffers = jnp.einsum("erf,efd->erd", activation(gate, hidden), kernels.down)
    if layout.axes:
        buffers = jax.lax.all_to_all(buffers, layout.axes, 1, 0, tiled=True)
    buffers = checkpoint_name(buffers, "experts.exchanged")
    found = collect(buffers.reshape(num_places, embed), moved)
    mixed = weighted(found, weights.reshape(target.shape))
    return layout.leave(mixed.astype(x.dtype).reshape(x.shape))
