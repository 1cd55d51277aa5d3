"""Nesterov's accelerated gradient, with restarts."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jdml.optimize.base import Method, Params, add, dot, smooth_refusal
from jdml.optimize.first_order.gradient_descent import checked_step, first_bound_or
from jdml.optimize.first_order.majorise import Point, between, descend, point, smooth_part


class AcceleratedState(NamedTuple):
    """Attributes:
    point: x, the answer.
    ahead: y, from which the next step is taken.
    momentum: t of Beck & Teboulle; 1 after a restart.
    value: The objective at x.
    mapping: The prox-gradient norm at the y from which x was reached.
    bound: L.
    """

    point: Point
    ahead: Point
    momentum: jax.Array
    value: jax.Array
    mapping: jax.Array
    bound: jax.Array

    @property
    def params(self) -> Params:
        return self.point.params


@dataclasses.dataclass(frozen=True)
class Accelerated(Method):
    """With ``whole`` the penalty has a gradient, else a prox."""

    step_size: float | None
    restart: bool
    whole: ClassVar[bool] = True
    name = "accelerated"
    certificate = "gradient norm"
    order = "first"
    sampling = "deterministic"

    @classmethod
    def refusal(cls, problem):
        return smooth_refusal(problem)

    def init(self, problem, params):
        if problem.penalty.constraint:
            params = params._replace(w=problem.penalty.project(params.w))
        start = point(problem, params)
        bound = first_bound_or(problem, start, self.whole, self.step_size)
        one = jnp.ones((), problem.dtype)
        # One step of no momentum measures the start, and its end is thrown away.
        step = self._descend(problem, start, bound)
        return AcceleratedState(start, start, one, problem.value(params), step.mapping, step.bound)

    def step(self, problem, state):
        step = self._descend(problem, state.ahead, state.bound)
        x, y, z = state.point, state.ahead.params, step.end
        t = (1 + jnp.sqrt(1 + 4 * state.momentum**2)) / 2
        pushed = between(x, z, 1 + (state.momentum - 1) / t)
        if self.restart:
            # The way just taken leads uphill: go on from where it ended, without momentum.
            uphill = dot(add(y, -1.0, z.params), add(z.params, -1.0, x.params)) > 0
            t = jnp.where(uphill, 1.0, t)
            pushed = jax.tree.map(lambda a, b: jnp.where(uphill, a, b), z, pushed)
        value = step.value if self.whole else step.value + problem.penalty.value(z.params.w)
        return AcceleratedState(z, pushed, t, value, step.mapping, step.bound)

    def _descend(self, problem, start, bound):
        known = smooth_part(problem, start, self.whole)
        return descend(problem, start, *known, bound, self.whole, self.step_size is not None)

    def measure(self, problem, state):
        return state.value, state.mapping


def accelerated(step_size: float | None = None, restart: bool = True) -> Accelerated:
    """``x <- y - η ∇P(y)``; ``y <- x + (t - 1)/t' (x - x_before)``, ``t' = (1 + √(1 + 4t²))/2``.

    Without restarts and ``η = 1/L``, ``P(x_k) - P* <= 2 L |x_0 - p*|² / (k + 1)²``. With them, t is
    set back to 1 whenever ``<y - x, x - x_before> > 0``, which makes the rate linear where P is
    strongly convex, ``1 - O(√(μ/L))`` a step, with μ unknown.

    Args:
      step_size: η > 0; by default 1/L with an L found by backtracking.
      restart: Whether to restart.

    For differentiable losses and smooth penalties. Certificate: ``|∇P|`` at the point from which
    the answer is one step onward.

    References: Nesterov 1983; Beck & Teboulle, "A Fast Iterative Shrinkage-Thresholding Algorithm",
    2009; O'Donoghue & Candès, "Adaptive Restart for Accelerated Gradient Schemes", 2015.
    """
    return Accelerated(checked_step("accelerated", step_size), bool(restart))
