"""What a mixture of experts computes, spelt out: every expert on every token, then weighted."""

import jax
import jax.numpy as jnp

from jdml.models.experts.kernels import Kernels, activation
from jdml.models.experts.routing import Routing, combine_weights


def evaluate_densely(
    x: jax.Array, routing: Routing, kernels: Kernels, kept: jax.Array | None = None
) -> jax.Array:
    """``y = Σ_e weight_e(x) · expert_e(x)``, at E / k times the products that are needed.

    The definition that the other two forms are held to. Nothing is exchanged between devices but
    what a layout of the operands asks for.

    Args:
      x: [..., embed].
      routing: of the same tokens.
      kernels: of all experts.
      kept: bool [..., k]: choices that count; None for all.

    Returns:
      Shaped like ``x``, in its dtype; summed in float32.
    """
    up = jnp.einsum("...d,edf->...ef", x, kernels.up)
    gate = None if kernels.gate is None else jnp.einsum("...d,edf->...ef", x, kernels.gate)
    outputs = jnp.einsum("...ef,efd->...ed", activation(gate, up), kernels.down)
    weights = combine_weights(routing, kept)
    return jnp.einsum("...ed,...e->...d", outputs.astype(jnp.float32), weights).astype(x.dtype)
