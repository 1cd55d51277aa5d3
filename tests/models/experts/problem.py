"""One layer of experts as a loss of its operands, evaluated in each form."""

import jax
import jax.numpy as jnp
import numpy as np

from jdml.models.experts import (
    Kernels,
    balance_of,
    capacity_of,
    evaluate_densely,
    evaluate_dropless,
    evaluate_with_capacity,
    places,
    route,
)

BATCH, SEQ, EMBED, HIDDEN, EXPERTS, CHOICES = 8, 6, 5, 12, 8, 2
CAPACITY_FACTOR = 1.0  # drops a fifth of the choices of these tokens


def operands(gated=True, workers=None):
    """``(kernels, router)`` and tokens, which prefer some experts."""
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = [(EXPERTS, EMBED, HIDDEN)] * 2 + [(EXPERTS, HIDDEN, EMBED)]
    kernels = [
        jax.random.normal(k, s) * s[1] ** -0.5 for k, s in zip(keys[:3], shapes, strict=True)
    ]
    kernels = Kernels(kernels[0] if gated else None, *kernels[1:])
    shape = (BATCH, SEQ, EMBED) if workers is None else (workers, BATCH, SEQ, EMBED)
    return (kernels, jax.random.normal(keys[3], (EMBED, EXPERTS))), jax.random.normal(
        keys[4], shape
    )


def loss_of(form, slack=2.0, factor=CAPACITY_FACTOR):
    """``loss(params, x)``, the routers' losses included; forms called "…, capacity" drop alike."""

    def loss(params, x):
        kernels, router = params
        routing = route(x @ router, CHOICES)
        kept = None
        if form.endswith("capacity"):
            capacity = capacity_of(factor, CHOICES, SEQ, EXPERTS)
            place = places(routing.experts, EXPERTS, capacity)
            kept = place >= 0
        if form.startswith("dense"):
            y = evaluate_densely(x, routing, kernels, kept)
        elif form == "capacity":
            y = evaluate_with_capacity(x, routing, kernels, place, capacity)
        else:
            y = evaluate_dropless(x, routing, kernels, slack)
        balance = balance_of(routing, kept)
        losses = balance.load_balance + balance.importance + 0.1 * balance.router_z
        return jnp.sum(jnp.sin(y)) + losses, balance.dropped

    return loss


DENSE = {"capacity": "dense, capacity", "dropless": "dense"}
"""What each form is to equal."""


def gradients_of(form, **options):
    """``(params, x) → ((loss, dropped), gradients)``, those of the tokens included."""
    return jax.value_and_grad(loss_of(form, **options), (0, 1), has_aux=True)


def assert_equal(got, wanted):
    """To float32 rounding: sums of a few hundred terms in another order."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        b = np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6 * max(1, np.abs(b).max()))
