"""L-BFGS: Optax's direction and line search, on margins."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from jdml.optimize.base import Method, Params, dot, norm, smooth_refusal
from jdml.optimize.first_order.majorise import Point, point
from jdml.optimize.second_order.descent import DescentState, along, at

REFRESH = 16
"""Steps after which margins are computed anew from the parameters, for rounding adds up."""


class LbfgsState(NamedTuple):
    """Attributes:
    here: Point, value and gradient.
    memory: Optax's.
    num_steps: Steps taken.
    """

    here: DescentState
    memory: Any
    num_steps: jax.Array

    @property
    def params(self) -> Params:
        return self.here.params


@dataclasses.dataclass(frozen=True)
class Lbfgs(Method):
    memory: int
    max_trials: int
    name = "lbfgs"
    certificate = "gradient norm"
    order = "second"
    sampling = "deterministic"

    @classmethod
    def refusal(cls, problem):
        return smooth_refusal(problem)

    def init(self, problem, params):
        flat, _ = ravel_pytree(params)
        memory = optax.scale_by_lbfgs(self.memory).init(flat)
        return LbfgsState(at(problem, point(problem, params)), memory, jnp.zeros((), jnp.int32))

    def step(self, problem, state):
        here = state.here
        flat, unravel = ravel_pytree(here.params)
        gradient, _ = ravel_pytree(here.gradient)
        direction, memory = optax.scale_by_lbfgs(self.memory).update(gradient, state.memory, flat)
        way = Point(unravel(-direction), problem.margins(unravel(-direction)))
        t = self._length(problem, here, way)
        end = Point(unravel(flat - t * direction), here.point.margins + t * way.margins)
        count = state.num_steps + 1
        margins = jax.lax.cond(
            count % REFRESH == 0, lambda: problem.margins(end.params), lambda: end.margins
        )
        return LbfgsState(at(problem, Point(end.params, margins)), memory, count)

    def _length(self, problem, here, way):
        """Optax's search for a strong Wolfe point, over the one number t."""
        search = optax.scale_by_zoom_linesearch(
            max_linesearch_steps=self.max_trials, initial_guess_strategy="one"
        )
        zero, one = jnp.zeros((), problem.dtype), jnp.ones((), problem.dtype)
        length, _ = search.update(
            one,
            search.init(zero),
            zero,
            value=here.value,
            grad=dot(here.gradient, way.params),
            value_fn=lambda t: along(problem, here.point, way, t),
        )
        return length

    def measure(self, problem, state):
        return state.here.value, norm(state.here.gradient)


def lbfgs(memory: int = 10, max_trials: int = 20) -> Lbfgs:
    """``p <- p - t H ∇P``, H from the last ``memory`` differences of points and gradients.

    A step costs one product with X, one with Xᵀ, and ``4 memory d`` operations; the line search
    asks for the strong Wolfe conditions, on the margins. Its rate is linear where P is strongly
    convex.

    Args:
      memory: Pairs kept.
      max_trials: Most trials of a line search.

    For differentiable losses and smooth penalties. Certificate: ``|∇P|``.

    Reference: Liu & Nocedal, "On the Limited Memory BFGS Method for Large Scale Optimization",
    1989. Direction and search are Optax's ``scale_by_lbfgs`` and ``scale_by_zoom_linesearch``.
    """
    if memory < 1 or max_trials < 1:
        raise ValueError(f"lbfgs(memory={memory}, max_trials={max_trials}): expected at least 1.")
    return Lbfgs(int(memory), int(max_trials))
