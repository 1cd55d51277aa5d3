"""Gradient descent."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdml.optimize.base import Method, Params, norm, smooth_refusal
from jdml.optimize.first_order.majorise import Point, descend, first_bound, point, smooth_part


class GradientDescentState(NamedTuple):
    """Attributes:
    point: Parameters and margins.
    value: The objective there.
    gradient: ``∇P`` there.
    bound: L, the reciprocal of the step.
    """

    point: Point
    value: jax.Array
    gradient: Params
    bound: jax.Array

    @property
    def params(self) -> Params:
        return self.point.params


@dataclasses.dataclass(frozen=True)
class GradientDescent(Method):
    step_size: float | None
    name = "gradient_descent"
    certificate = "gradient norm"
    order = "first"
    sampling = "deterministic"

    @classmethod
    def refusal(cls, problem):
        return smooth_refusal(problem)

    def init(self, problem, params):
        start = point(problem, params)
        bound = first_bound_or(problem, start, True, self.step_size)
        value, gradient = smooth_part(problem, start, True)
        return GradientDescentState(start, value, gradient, bound)

    def step(self, problem, state):
        fixed = self.step_size is not None
        here, value, gradient, bound = state
        step = descend(problem, here, value, gradient, bound, whole=True, fixed=fixed)
        return GradientDescentState(step.end, *smooth_part(problem, step.end, True), step.bound)

    def measure(self, problem, state):
        return state.value, norm(state.gradient)


def gradient_descent(step_size: float | None = None) -> GradientDescent:
    """``p <- p - η ∇P(p)``.

    On an L-smooth, μ-strongly convex P with ``η = 1/L``, ``P - P*`` shrinks by ``1 - μ/L`` a step;
    without strong convexity it is at most ``L |p_0 - p*|² / 2k``.

    Args:
      step_size: η > 0; by default 1/L with an L found by backtracking, which needs no constant of
        the problem and is at most 1.3 times too large.

    For differentiable losses and smooth penalties. Certificate: ``|∇P|``.

    Reference: Nesterov, "Lectures on Convex Optimization", 2018, section 2.1.5.
    """
    return GradientDescent(checked_step("gradient_descent", step_size))


def checked_step(name: str, step_size: float | None) -> float | None:
    if step_size is not None and not (math.isfinite(step_size) and step_size > 0):
        raise ValueError(f"{name}(step_size={step_size}): expected a number > 0, or None.")
    return step_size


def first_bound_or(problem, start: Point, whole: bool, step_size: float | None) -> jax.Array:
    if step_size is None:
        return first_bound(problem, start, whole)
    return jnp.asarray(1 / step_size, problem.dtype)
