"""Proximal operators of penalties on the consensus variable: ``argmin_z g(z) + |z - v|^2 / 2t``.

Each factory returns ``prox(tree, step) -> tree``, where ``step`` is t, a scalar. They are made of
Optax's projections, as those of the penalties in ``jdml.models.linear`` are.

Reference: Parikh & Boyd, "Proximal Algorithms", 2014, chapter 6.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from optax import projections

PyTree = Any
Proximal = Callable[[PyTree, jax.Array], PyTree]
Mask = Callable[[PyTree], PyTree] | None


def prox_none() -> Proximal:
    """No penalty: the identity."""
    return lambda tree, step: tree


def prox_l1(strength: float, mask: Mask = None) -> Proximal:
    """``g(z) = strength |z|_1``: shrinks towards zero by ``step * strength``, and stops there.

    Args:
      strength: At least 0.
      mask: ``params -> tree of bool``; leaves marked False are not penalised (an intercept).
    """
    return prox_elastic_net(strength, 0.0, mask)


def prox_l2(strength: float, mask: Mask = None) -> Proximal:
    """``g(z) = strength/2 |z|_2^2``: divides by ``1 + step * strength``; arguments as prox_l1."""
    return prox_elastic_net(0.0, strength, mask)


def prox_elastic_net(l1: float, l2: float, mask: Mask = None) -> Proximal:
    """``g(z) = l1 |z|_1 + l2/2 |z|_2^2``: shrinks, then divides; arguments as prox_l1."""
    for name, strength in (("l1", l1), ("l2", l2)):
        if not (math.isfinite(strength) and strength >= 0):
            raise ValueError(f"the strength of the {name} penalty is {strength}; expected >= 0.")

    def prox(v: jax.Array, step: jax.Array) -> jax.Array:
        # Shrinking towards 0 leaves what a box does not hold (Moreau's identity).
        return (v - projections.projection_box(v, -step * l1, step * l1)) / (1 + step * l2)

    return _on_leaves(prox, mask)


def prox_box(low: float, high: float, mask: Mask = None) -> Proximal:
    """Constrains every element to ``[low, high]``; arguments as prox_l1."""
    if not low <= high:
        raise ValueError(f"prox_box({low}, {high}): expected low <= high.")
    return _on_leaves(lambda v, step: projections.projection_box(v, low, high), mask)


def prox_non_negative(mask: Mask = None) -> Proximal:
    """Constrains every element to be at least 0; arguments as prox_l1."""
    return prox_box(0.0, math.inf, mask)


def _on_leaves(prox: Callable[[jax.Array, jax.Array], jax.Array], mask: Mask) -> Proximal:
    def on_tree(tree: PyTree, step: jax.Array) -> PyTree:
        chosen = jax.tree.map(lambda _: True, tree) if mask is None else mask(tree)
        return jax.tree.map(
            lambda v, use: prox(v, step).astype(v.dtype) if use else v, tree, chosen
        )

    return on_tree
