"""Which experts a token goes to, with what weights, and the losses that spread the tokens.

With router logits ``h`` of E experts and k of them for each token, two orders are in use:

- ``"top_k_then_softmax"``: softmax over the k largest logits; a token's weights sum to 1 (Mixtral;
  also GShard's two gates divided by their sum).
- ``"softmax_then_top_k"``: the k largest of softmax over all E; the sum tells how sure the router
  is, and with k = 1 a gradient reaches it through the weight (Switch).

All of it is in float32, whatever the model's dtype: the exponential makes rounding errors of the
logits errors of the weights.

References: Shazeer et al., "Outrageously Large Neural Networks", 2017; Lepikhin et al., "GShard",
2020; Fedus et al., "Switch Transformers", 2021; Zoph et al., "ST-MoE", 2022; Jiang et al.,
"Mixtral of Experts", 2024.
"""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

Order = Literal["top_k_then_softmax", "softmax_then_top_k"]


class Routing(NamedTuple):
    """Choices of every token, the likeliest first.

    ``experts``: int32 [..., k]; ``weights``: float32 [..., k]; ``logits``: float32 [..., E].
    """

    experts: jax.Array
    weights: jax.Array
    logits: jax.Array


class Balance(NamedTuple):
    """How evenly the experts are used, float32 scalars; the first three are losses.

    ``load_balance``, ``importance``, ``router_z``: see the functions; ``dropped``: fraction of the
    choices that found no room; ``busiest``: choices of the busiest expert over the mean.
    """

    load_balance: jax.Array
    importance: jax.Array
    router_z: jax.Array
    dropped: jax.Array
    busiest: jax.Array


def route(logits: jax.Array, num_choices: int, order: Order = "top_k_then_softmax") -> Routing:
    """The ``num_choices`` experts of each token and their weights.

    Args:
      logits: float32 [..., E].
      num_choices: k.
      order: see the module's text.

    Raises:
      ValueError: k outside 1 … E, or an unknown order.
    """
    num_experts = logits.shape[-1]
    if not 1 <= num_choices <= num_experts:
        raise ValueError(
            f"expected 1 to {num_experts} choices among {num_experts} experts, got {num_choices}"
        )
    if order not in get_args(Order):
        raise ValueError(f"order must be one of {get_args(Order)}, got {order!r}")
    logits = logits.astype(jnp.float32)
    experts = _largest(logits, num_choices)
    scores = logits if order == "top_k_then_softmax" else jax.nn.softmax(logits, axis=-1)
    chosen = experts[..., None] == jnp.arange(num_experts)
    weights = jnp.sum(jnp.where(chosen, scores[..., None, :], 0.0), axis=-1)
    if order == "top_k_then_softmax":
        weights = jax.nn.softmax(weights, axis=-1)
    return Routing(experts, weights, logits)


def _largest(logits: jax.Array, number: int) -> jax.Array:
    """Indices of the largest, as ``lax.top_k`` has them: the first of equal ones first.

    One after the other: XLA's partitioner gathers the operand of ``top_k`` from all devices.
    """
    rest = jnp.maximum(jax.lax.stop_gradient(logits), jnp.finfo(jnp.float32).min)
    found = []
    for _ in range(number):
        best = jnp.argmax(rest, axis=-1).astype(jnp.int32)
        found.append(best)
        rest = jnp.where(best[..., None] == jnp.arange(logits.shape[-1]), -jnp.inf, rest)
    return jnp.stack(found, axis=-1)


def load_balance_loss(routing: Routing) -> jax.Array:
    """``E · Σ_e f_e P_e``: 1 where all experts are used alike, up to E where one has all.

    ``f_e`` is the fraction of all choices that fell on expert e, ``P_e`` the mean over tokens of
    its probability (softmax over all experts). Only P has a gradient: it lowers the probability of
    the experts that have more than their share. For k = 1 it is Switch's loss.
    """
    num_experts = routing.logits.shape[-1]
    probability = _mean_over_tokens(jax.nn.softmax(routing.logits, axis=-1))
    return num_experts * jnp.sum(_fractions(routing) * probability)


def importance_loss(routing: Routing) -> jax.Array:
    """``Var(I) / mean(I)²`` of the experts' importance ``I_e = Σ_tokens weight_e``; 0 where alike.

    Shazeer et al.'s; its gradient goes through the weights of the chosen experts alone.
    """
    importance = _mean_over_tokens(combine_weights(routing))
    mean = jnp.mean(importance)
    return jnp.mean((importance - mean) ** 2) / mean**2


def router_z_loss(routing: Routing) -> jax.Array:
    """Mean over tokens of ``logsumexp(h)²``: keeps the logits small (Zoph et al.)."""
    return jnp.mean(jax.nn.logsumexp(routing.logits, axis=-1) ** 2)


def balance_of(routing: Routing, kept: jax.Array | None = None) -> Balance:
    """The three losses, and what became of the choices.

    Args:
      routing: of the tokens that a loss is of: in a training step one worker's, over all devices
        that hold them.
      kept: bool [..., k], choices that found room; None if all did.
    """
    dropped = jnp.zeros(()) if kept is None else 1 - jnp.mean(kept, dtype=jnp.float32)
    return Balance(
        load_balance_loss(routing),
        importance_loss(routing),
        router_z_loss(routing),
        dropped,
        jnp.max(_fractions(routing)) * routing.logits.shape[-1],
    )


def combine_weights(routing: Routing, kept: jax.Array | None = None) -> jax.Array:
    """float32 [..., E]: a token's weight of each expert, 0 for those not chosen or not ``kept``."""
    weights = routing.weights if kept is None else jnp.where(kept, routing.weights, 0.0)
    chosen = routing.experts[..., None] == jnp.arange(routing.logits.shape[-1])
    return jnp.sum(jnp.where(chosen, weights[..., None], 0.0), axis=-2)


def _fractions(routing: Routing) -> jax.Array:
    chosen = routing.experts[..., None] == jnp.arange(routing.logits.shape[-1])
    return _mean_over_tokens(jnp.mean(chosen, axis=-2, dtype=jnp.float32))


def _mean_over_tokens(x: jax.Array) -> jax.Array:
    return jnp.mean(x, axis=tuple(range(x.ndim - 1)))
