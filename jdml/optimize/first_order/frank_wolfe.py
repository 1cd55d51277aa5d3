"""Frank-Wolfe: a linear problem over the constrained set at every step, and no projection."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdml.optimize.base import Method, Params, add, dot, proximal_refusal
from jdml.optimize.first_order.majorise import Point, between, point, smooth_part

BISECTIONS = 30
"""Halvings of [0, 1] by the line search; each costs a pass over the margins, none over X."""


class FrankWolfeState(NamedTuple):
    """Attributes:
    point: Parameters and margins.
    corner: s, the corner towards which the next step goes.
    value: The objective.
    gap: The Frank-Wolfe gap.
    num_steps: Steps taken.
    """

    point: Point
    corner: Params
    value: jax.Array
    gap: jax.Array
    num_steps: jax.Array

    @property
    def params(self) -> Params:
        return self.point.params


@dataclasses.dataclass(frozen=True)
class FrankWolfe(Method):
    line_search: bool
    name = "frank_wolfe"
    certificate = "Frank-Wolfe gap"
    order = "first"
    sampling = "deterministic"

    @classmethod
    def refusal(cls, problem):
        penalty = problem.penalty
        if not penalty.constraint:
            return f"{penalty.name} is no constraint, and its set has no corners to go to"
        bounds = (getattr(penalty, "low", 0.0), getattr(penalty, "high", 0.0))
        if not all(np.all(np.isfinite(bound)) for bound in bounds):
            return "the constrained set is not bounded"
        if problem.intercept:
            return "the intercept is not constrained; centre the columns and the labels instead"
        return proximal_refusal(problem)

    def init(self, problem, params):
        inside = params._replace(w=problem.penalty.project(params.w))
        return self._at(problem, point(problem, inside), jnp.zeros((), jnp.int32))

    def _at(self, problem, at: Point, count: jax.Array) -> FrankWolfeState:
        value, gradient = smooth_part(problem, at, whole=False)
        corner = at.params._replace(w=problem.penalty.lmo(gradient.w))
        gap = dot(gradient, add(at.params, -1.0, corner))
        return FrankWolfeState(at, corner, value, gap, count)

    def step(self, problem, state):
        start, corner = state.point, point(problem, state.corner)
        size = 2 / (state.num_steps + 2).astype(problem.dtype)
        if self.line_search:
            size = self._best(problem, start.margins, corner.margins - start.margins)
        return self._at(problem, between(start, corner, size), state.num_steps + 1)

    def _best(self, problem, margins, direction):
        """Where in [0, 1] the derivative along the way, which rises, passes 0."""

        def halve(_, ends):
            low, high = ends
            middle = (low + high) / 2
            falls = jnp.vdot(problem.slopes(margins + middle * direction), direction) < 0
            return jnp.where(falls, middle, low), jnp.where(falls, high, middle)

        ends = jnp.zeros((), problem.dtype), jnp.ones((), problem.dtype)
        low, high = jax.lax.fori_loop(0, BISECTIONS, halve, ends)
        falls = jnp.vdot(problem.slopes(margins + direction), direction) <= 0
        return jnp.where(falls, 1.0, (low + high) / 2)

    def measure(self, problem, state):
        return state.value, state.gap


def frank_wolfe(line_search: bool = True) -> FrankWolfe:
    """``s = argmin_{s in C} <∇f(w), s>``; ``w <- w + γ (s - w)``.

    ``f(w_k) - f* <= 2 L diam(C)² / (k + 2)`` with ``γ = 2/(k + 2)``, and no worse with the line
    search. Each step adds one corner, so after k steps on the l1 ball at most k weights are not 0
    (the start being 0).

    Args:
      line_search: Whether γ is the best in [0, 1], found by bisection on the margins; else
        ``2/(k + 2)``.

    For differentiable losses with a bounded constraint and no intercept. Certificate: the gap
    ``<∇f(w), w - s>``, which is at least ``f(w) - f*``.

    Reference: Jaggi, "Revisiting Frank-Wolfe", ICML 2013.
    """
    return FrankWolfe(bool(line_search))
