"""Randomised coordinate descent."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdml.optimize.base import Method, Params, bounded_refusal, stationarity
from jdml.optimize.one_by_one import one_by_one_refusal


class CoordinateDescentState(NamedTuple):
    """Attributes:
    params: The parameters.
    num_steps: Epochs; the coordinates of one follow from it and the key.
    key: Of all draws.
    """

    params: Params
    num_steps: jax.Array
    key: jax.Array


@dataclasses.dataclass(frozen=True)
class CoordinateDescent(Method):
    seed: int = dataclasses.field(compare=False)
    name = "coordinate_descent"
    certificate = "gradient norm"
    order = "first"
    sampling = "stochastic"

    @classmethod
    def refusal(cls, problem):
        if problem.loss.num_outputs is not None:
            return "it takes one margin a sample"
        if not problem.penalty.separable:
            return f"{problem.penalty.name} is no sum over coordinates"
        return bounded_refusal(problem) or one_by_one_refusal(problem, "columns")

    def init(self, problem, params):
        return CoordinateDescentState(params, jnp.zeros((), jnp.int32), jax.random.key(0))

    def seeded(self, state):
        return state._replace(key=jax.random.key(self.seed))

    def step(self, problem, state):
        n, d = problem.rows.shape
        loss, smoothness = problem.loss, problem.loss.smoothness
        scale = problem.sample_weight / n
        bounds = smoothness * problem.rows.square().rmatvec(scale)
        bounds = jnp.where(bounds > 0, bounds, 1.0)
        columns = problem.rows.T
        key = jax.random.fold_in(state.key, state.num_steps)
        # The last number, if there is an intercept, is its.
        drawn = jax.random.randint(key, (d + problem.intercept,), 0, d + problem.intercept)

        def slopes(margins, y, scale):
            return scale * loss.derivative(margins, y)

        def weight(j, params, margins):
            slope = columns.dot_of(j, slopes, margins, problem.y, scale)
            before = params.w[j]
            after = problem.penalty.prox(before - slope / bounds[j], 1 / bounds[j])
            margins = columns.add(margins, j, after - before)
            return params._replace(w=params.w.at[j].set(after)), margins

        def shift(j, params, margins):
            slope = jnp.sum(slopes(margins, problem.y, scale))
            change = -slope / (smoothness * jnp.sum(scale))
            return params._replace(b=params.b + change), margins + change

        def move(carry, j):
            if params.b is None:
                return weight(j, *carry), None
            return jax.lax.cond(j < d, weight, shift, j, *carry), None

        params = state.params
        carry = (params, problem.margins(params))
        (params, _), _ = jax.lax.scan(move, carry, drawn)
        return CoordinateDescentState(params, state.num_steps + 1, state.key)

    def measure(self, problem, state):
        value, found = problem.loss_and_gradient(state.params)
        value = value + problem.penalty.value(state.params.w)
        return value, stationarity(problem, state.params, found)


def coordinate_descent(seed: int = 0) -> CoordinateDescent:
    """``w_j <- prox_{R_j/L_j}(w_j - ∂_j f(w)/L_j)``, j drawn uniformly, ``L_j = sup ∂²_j f``.

    A step is an epoch, as many draws as coordinates (the intercept is one); a draw costs the
    non-zeros of a column, and margins are carried along. On an objective that is μ-strongly convex
    in the norm ``Σ L_j w_j²``, ``E P - P*`` shrinks by ``1 - μ/d`` a draw.

    Args:
      seed: Of the draws.

    For differentiable losses of bounded curvature with one margin a sample, and penalties and
    constraints that are sums over coordinates. Certificate: ``|∇P|``, or with a penalty that has no
    gradient ``|p - prox_R(p - ∇f(p))|``, from a pass over all samples after each epoch.

    References: Nesterov, "Efficiency of Coordinate Descent Methods on Huge-Scale Optimization
    Problems", 2012; Richtárik & Takáč 2014 (with a prox).
    """
    return CoordinateDescent(int(seed))
