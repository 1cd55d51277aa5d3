"""A worker's own smooth problem, solved by Newton's method: what ADMM and DANE ask of it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jdml.optimize.base import Problem

MOST_STEPS = 30
HALVINGS = 30


class _At(NamedTuple):
    """Where the method stands: parameters, their margins, value and gradient."""

    x: jax.Array
    margins: jax.Array
    value: jax.Array
    gradient: jax.Array
    num_steps: jax.Array


def own_problem(
    problem: Problem, block: Any, y: jax.Array, weight: jax.Array, penalty: Any
) -> Problem:
    """Of one of K workers: its mean loss is ``f_k``, where ``Σ_k f_k / K`` is that of all.

    Args:
      problem: The whole one, for its loss and intercept.
      block, y, weight: The worker's part.
      penalty: As the problem's, an array of this worker.
    """
    return problem.replace(rows=block, y=y, sample_weight=weight, penalty=penalty)  # type: ignore[attr-defined]


def minimise(
    own: Problem,
    start: jax.Array,
    unravel: Any,
    linear: jax.Array,
    quadratic: jax.Array,
    accuracy: float,
) -> jax.Array:
    """``argmin_x f_k(x) + linearᵀ x + Σ_j quadratic_j x_j² / 2``, ``[p]``; nothing travels.

    Newton's method with Cholesky and backtracking, until the gradient's norm is ``accuracy`` of
    what it was at the start (or rounding ends it): with starts that get better from round to round
    the error falls with them.

    Args:
      own: ``own_problem``.
      start: ``[p]``, ravelled parameters.
      unravel: Back to parameters.
      linear: ``[p]``.
      quadratic: ``[p]``, >= 0, and above 0 where the loss alone is not strictly convex.
      accuracy: In (0, 1).
    """
    eps = jnp.finfo(start.dtype).eps

    def value_at(x: jax.Array, margins: jax.Array) -> jax.Array:
        return own.loss_at(margins) + jnp.vdot(linear, x) + jnp.vdot(quadratic * x, x) / 2

    def at(x: jax.Array, margins: jax.Array, num_steps: jax.Array) -> _At:
        pulled, _ = ravel_pytree(own.pull(own.slopes(margins)))
        return _At(x, margins, value_at(x, margins), pulled + linear + quadratic * x, num_steps)

    def step(here: _At) -> _At:
        matrix = own.hessian(here.margins) + jnp.diag(quadratic)
        factor = jax.scipy.linalg.cho_factor(matrix)
        direction = -jax.scipy.linalg.cho_solve(factor, here.gradient)
        moved, slope = own.margins(unravel(direction)), jnp.vdot(direction, here.gradient)
        slack = 8 * eps * jnp.abs(here.value)

        def too_far(carry: tuple[jax.Array, jax.Array]) -> jax.Array:
            t, halvings = carry
            value = value_at(here.x + t * direction, here.margins + t * moved)
            return ~(value <= here.value + 1e-4 * t * slope + slack) & (halvings < HALVINGS)

        first = jnp.ones((), start.dtype), jnp.zeros((), jnp.int32)
        t, _ = jax.lax.while_loop(too_far, lambda c: (c[0] / 2, c[1] + 1), first)
        return at(here.x + t * direction, here.margins + t * moved, here.num_steps + 1)

    first = at(start, own.margins(unravel(start)), jnp.zeros((), jnp.int32))
    enough = accuracy * jnp.linalg.norm(first.gradient)
    floor = 4 * eps * (jnp.linalg.norm(linear) + jnp.linalg.norm(quadratic * start))

    def unfinished(here: _At) -> jax.Array:
        size = jnp.linalg.norm(here.gradient)
        return (size > jnp.maximum(enough, floor)) & (here.num_steps < MOST_STEPS)

    return jax.lax.while_loop(unfinished, step, first).x


def on_weights(problem: Problem, strength: jax.Array | float) -> jax.Array:
    """``strength`` for each weight and 0 for the intercept, ``[p]``."""
    zeros = problem.init()
    full = zeros._replace(w=jnp.full_like(zeros.w, strength))
    return ravel_pytree(full)[0]
