"""What methods share whose workers have columns: the margins, which all of them know."""

from typing import Any

import jax
import jax.numpy as jnp

from jdml.aggregate.linear.divided import divided_refusal
from jdml.optimize.base import Params, Problem, bounded_refusal, stationarity


def columns_refusal(problem: Problem) -> str | None:
    """Why blocks of columns cannot be treated alone, against a bound on the curvature."""
    if problem.loss.num_outputs is not None:
        return "it takes one margin a sample"
    if not problem.penalty.separable:
        return f"{problem.penalty.name} is no sum over coordinates"
    return bounded_refusal(problem) or divided_refusal(problem, "feature")


def bends(problem: Problem) -> jax.Array:
    """``s_i sup φ'' / n``, ``[n]``: what bounds the curvature of the loss in its margins."""
    return problem.loss.smoothness * problem.sample_weight / problem.num_samples


def shifted(problem: Problem, params: Params, margins: jax.Array) -> tuple[Params, jax.Array]:
    """A step of the intercept, which everybody computes from the margins; nothing travels."""
    if params.b is None:
        return params, margins
    change = -jnp.sum(problem.slopes(margins)) / jnp.sum(bends(problem))
    return params._replace(b=params.b + change), margins + change


def with_weights(params: Params, parts: jax.Array) -> Params:
    """Parameters with the weights ``[K, d_k]`` of all workers."""
    return params._replace(w=parts.ravel())


def measured(problem: Problem, params: Params, margins: jax.Array) -> tuple[Any, Any]:
    """``(P, |∇P| or the prox-gradient norm)`` from margins that are there: a few scalars travel."""
    gradient = problem.pull(problem.slopes(margins))
    value = problem.loss_at(margins) + problem.penalty.value(params.w)
    return value, stationarity(problem, params, gradient)
