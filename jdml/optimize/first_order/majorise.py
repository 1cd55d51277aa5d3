"""The step that first-order methods share: the minimum of a quadratic that lies above.

    z = prox_{R/L}(y - ∇f(y)/L),   f(z) <= f(y) + <∇f(y), z - y> + L/2 |z - y|²,

with L raised until the bound holds, so that no constant of the problem need be known. f is the mean
loss and R the penalty; a smooth penalty may be part of f instead, whose step has no prox. Margins
are carried along: a step costs one product with X and one with Xᵀ.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdml.optimize.base import Params, Problem, add, dot, norm

RAISE = 1.3
"""Factor of L when the bound does not hold."""
POWER_STEPS = 6
"""Steps of the power method for the first L."""


class Point(NamedTuple):
    """Parameters with their margins."""

    params: Params
    margins: jax.Array


def between(a: Point, b: Point, t: jax.Array) -> Point:
    """``a + t (b - a)``, beyond b for t > 1; margins are affine in the parameters."""
    return jax.tree.map(lambda x, y: x + t * (y - x), a, b)


def point(problem: Problem, params: Params) -> Point:
    return Point(params, problem.margins(params))


def smooth_part(problem: Problem, at: Point, whole: bool) -> tuple[jax.Array, Params]:
    """f and its gradient; ``whole``: the penalty is part of f."""
    value, gradient = problem.loss_at(at.margins), problem.pull(problem.slopes(at.margins))
    if not whole:
        return value, gradient
    w = at.params.w
    gradient = gradient._replace(w=gradient.w + problem.penalty.gradient(w))
    return value + problem.penalty.value(w), gradient


def first_bound(problem: Problem, at: Point, whole: bool) -> jax.Array:
    """About the largest curvature of f at a point: the power method, started from the gradient."""
    _, direction = smooth_part(problem, at, whole)
    # Zero at a minimum: any direction will do then.
    direction = jax.tree.map(lambda g: g + (norm(direction) == 0), direction)

    def once(_, carry):
        v, _ = carry
        v = jax.tree.map(lambda x: x / norm(v), v)
        product = problem.curvature_product(at.margins, v)
        if whole:
            product = product._replace(w=product.w + problem.penalty.strong_convexity * v.w)
        return product, norm(product)

    _, largest = jax.lax.fori_loop(0, POWER_STEPS, once, (direction, norm(direction)))
    return jnp.where(largest > 0, largest, 1.0).astype(problem.dtype)


class Descent(NamedTuple):
    """A step taken.

    Attributes:
      end: z.
      value: f(z), without the penalty unless it is part of f.
      bound: L.
      mapping: ``L |y - z|``, the prox-gradient norm at y; ``|∇f(y)|`` where there is no prox.
    """

    end: Point
    value: jax.Array
    bound: jax.Array
    mapping: jax.Array


def descend(
    problem: Problem,
    start: Point,
    value: jax.Array,
    gradient: Params,
    bound: jax.Array,
    whole: bool,
    fixed: bool = False,
) -> Descent:
    """The step from y = ``start``, where f is ``value`` and ∇f is ``gradient``.

    ``fixed``: with the L given, whether the bound holds or not.
    """

    def attempt(bound: jax.Array) -> Descent:
        params = add(start.params, -1 / bound, gradient)
        if not whole:
            params = problem.prox(params, 1 / bound)
        end = point(problem, params)
        found = problem.loss_at(end.margins)
        if whole:
            found = found + problem.penalty.value(params.w)
        moved = add(params, -1.0, start.params)
        return Descent(end, found, bound, bound * norm(moved))

    def too_low(step: Descent) -> jax.Array:
        moved = add(step.end.params, -1.0, start.params)
        slack = 8 * jnp.finfo(value.dtype).eps * jnp.abs(value)
        above = value + dot(gradient, moved) + step.bound / 2 * dot(moved, moved) + slack
        return ~(step.value <= above) & jnp.isfinite(step.bound)

    first = attempt(bound)
    if fixed:
        return first
    return jax.lax.while_loop(too_low, lambda step: attempt(RAISE * step.bound), first)
