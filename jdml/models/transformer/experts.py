"""The position-wise part of a block as a mixture of experts, in the place of one MLP.

    logits = x @ router                       [batch, seq, experts], float32
    k experts of each token, their weights    jdml.models.experts.routing
    y = Σ_k weight_k · expert_k(x) + shared(x)

The experts may be divided over a mesh axis (the logical name ``experts``), along which the tokens
are divided, too: they travel to their experts and back, experts never travel. Each expert's hidden
units may be divided besides, over the axis of ``mlp``.

References: Shazeer et al., "Outrageously Large Neural Networks", 2017; Fedus et al., "Switch
Transformers", 2021; shared experts: Dai et al., "DeepSeekMoE", 2024.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from jdml.models.experts import (
    Balance,
    Kernels,
    balance_of,
    capacity_of,
    evaluate_dropless,
    evaluate_with_capacity,
    places,
    route,
)
from jdml.models.experts.kernels import DOWN_NAMES, UP_NAMES
from jdml.models.transformer.config import TransformerConfig
from jdml.models.transformer.layers import param, truncated_normal
from jdml.models.transformer.mlp import make_mlp
from jdml.sharding import Without, constrain


class Experts(nnx.Module):
    """``num_experts`` MLPs of width ``mlp_dim``, of which each token passes through a few.

    Args:
      config: shapes and dtypes; ``num_experts`` is not None.
      rngs: stream ``params``.
    """

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        assert config.num_experts is not None
        experts, embed, hidden = config.num_experts, config.embed_dim, config.mlp_dim
        self.num_choices, self.order = config.experts_per_token, config.router
        self.capacity_factor = config.capacity_factor

        def into() -> nnx.Param:
            shape = (experts, embed, hidden)
            return param(truncated_normal(rngs.params(), shape, embed**-0.5), UP_NAMES)

        # Its dim of experts is whole on every device: all of a token's logits are needed there.
        router = truncated_normal(rngs.params(), (embed, experts), embed**-0.5)
        self.router = param(router, ("embed", None))
        self.gate = nnx.data(into() if config.mlp == "swiglu" else None)
        self.up = into()
        std = 1 / math.sqrt(2 * config.num_layers * hidden)
        down = truncated_normal(rngs.params(), (experts, hidden, embed), std)
        self.down = param(down, DOWN_NAMES)
        self.shared = nnx.data(None)
        if config.shared_experts:
            # Experts that all tokens pass through are one MLP as wide as all of them.
            wide = dataclasses.replace(
                config,
                num_experts=None,
                capacity_factor=None,
                shared_experts=0,
                mlp_dim=config.shared_experts * hidden,
            )
            self.shared = nnx.data(make_mlp(wide, rngs))

    def __call__(self, x: jax.Array) -> tuple[jax.Array, Balance]:
        """``x`` [batch, seq, embed] → the same shape, and how evenly the experts are used."""
        # Positions whole where the axis that divides them between blocks is the hidden units'.
        x = constrain(x, "batch", Without("seq", "mlp"), "embed")
        router = constrain(self.router[...], "embed", None)
        logits = jnp.matmul(x.astype(jnp.float32), router, precision=jax.lax.Precision.HIGHEST)
        routing = route(logits, self.num_choices, self.order)
        kernels = Kernels(
            None if self.gate is None else self.gate[...].astype(x.dtype),
            self.up[...].astype(x.dtype),
            self.down[...].astype(x.dtype),
        )
        if self.capacity_factor is None:
            kept, y = None, evaluate_dropless(x, routing, kernels)
        else:
            experts = logits.shape[-1]
            capacity = capacity_of(self.capacity_factor, self.num_choices, x.shape[1], experts)
            place = places(routing.experts, experts, capacity)
            kept, y = place >= 0, evaluate_with_capacity(x, routing, kernels, place, capacity)
        if self.shared is not None:
            y = y + self.shared(x)
        return y, balance_of(routing, kept)
