"""What methods of second order share: a state, a direction as margins, and a backtracking search.

Along a direction p margins are affine, ``a(t) = X w + t X p``, so that the objective at any t costs
a pass over the margins, and a search costs one product with X in all.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdml.optimize.base import Params, Problem, add
from jdml.optimize.first_order.majorise import Point, smooth_part

SUFFICIENT = 1e-4
"""Armijo's constant: the share of the decrease promised by the slope that is asked for."""
HALVINGS = 40


class DescentState(NamedTuple):
    """Attributes:
    point: Parameters and margins.
    value: The objective there.
    gradient: ``∇P`` there.
    """

    point: Point
    value: jax.Array
    gradient: Params

    @property
    def params(self) -> Params:
        return self.point.params


def at(problem: Problem, point: Point) -> DescentState:
    return DescentState(point, *smooth_part(problem, point, whole=True))


def along(problem: Problem, start: Point, direction: Point, t: jax.Array) -> jax.Array:
    """The objective at ``start + t direction``; the direction's margins are without b's share."""
    margins = start.margins + t * direction.margins
    w = start.params.w + t * direction.params.w
    return problem.loss_at(margins) + problem.penalty.value(w)


def backtrack(
    problem: Problem, state: DescentState, direction: Params, slope: jax.Array
) -> DescentState:
    """The first of t = 1, 1/2, 1/4, … with ``P(t) <= P(0) + 1e-4 t slope``, save for rounding.

    If there is none in ``HALVINGS``, the state stays.
    """
    way = Point(direction, problem.margins(direction))
    slack = 8 * jnp.finfo(state.value.dtype).eps * jnp.abs(state.value)

    def too_far(carry: tuple[jax.Array, jax.Array]) -> jax.Array:
        t, halvings = carry
        enough = state.value + SUFFICIENT * t * slope + slack
        return ~(along(problem, state.point, way, t) <= enough) & (halvings < HALVINGS)

    def halve(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        t, halvings = carry
        return t / 2, halvings + 1

    one = jnp.ones((), problem.dtype)
    t, halvings = jax.lax.while_loop(too_far, halve, (one, jnp.zeros((), jnp.int32)))
    t = jnp.where(halvings < HALVINGS, t, 0.0)
    return at(problem, Point(*(add(a, t, b) for a, b in zip(state.point, way, strict=True))))
