"""The box in which dual variables are feasible, as second-order methods need it."""

from typing import Any

import jax
import jax.numpy as jnp

SHORT_OF = 0.99
"""Share of the way to an end that a step may go where slopes are infinite at it."""


def bounds(loss: Any, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The least and the largest α of each label, ``[n]``."""
    if loss.dual_top is None:
        return jnp.full_like(y, -jnp.inf), jnp.full_like(y, jnp.inf)
    top = jnp.full_like(y, loss.dual_top)
    return jnp.where(y > 0, 0, -top), jnp.where(y > 0, top, 0)


def free(alpha: jax.Array, gradient: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """Which variables are not held at an end, by the gradient of what is minimised."""
    return ~(((alpha <= low) & (gradient > 0)) | ((alpha >= high) & (gradient < 0)))


def moved(
    loss: Any, alpha: jax.Array, change: jax.Array, low: jax.Array, high: jax.Array
) -> jax.Array:
    """``α + change``, projected, or kept inside of ends that are open."""
    if loss.dual_open:
        low = alpha + SHORT_OF * (low - alpha)
        high = alpha + SHORT_OF * (high - alpha)
    return jnp.clip(alpha + change, low, high)


def off_by(alpha: jax.Array, gradient: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """``max |α - project(α - gradient)|``: 0 at a minimum alone."""
    return jnp.max(jnp.abs(alpha - jnp.clip(alpha - gradient, low, high)))


def inside(loss: Any, point: jax.Array, y: jax.Array) -> jax.Array:
    """``point``, off ends that are open by as much as the dtype can tell."""
    if not loss.dual_open:
        return point
    slack = jnp.finfo(point.dtype).eps
    return y * jnp.clip(y * point, slack, loss.dual_top - slack)
