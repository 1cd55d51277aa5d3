"""A worker's own smooth problem, solved by Newton's method: what ADMM and DANE ask of it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jdml.optimize.base import Problem

MOST_STEPS = 30
HALVINGS = 30
KEPT_IF = 0.1
"""A step must leave this share of the gradient's norm, for its Hessian to serve the next one."""


class Curvature(NamedTuple):
    """The Hessian of a worker's loss where it was last computed.

    Attributes:
      matrix: ``[p, p]``, without what is added to the loss.
      serves: Whether the next step may take it, bool.
    """

    matrix: jax.Array
    serves: jax.Array


class _At(NamedTuple):
    """Where the method stands: parameters, their margins, value and gradient."""

    x: jax.Array
    margins: jax.Array
    value: jax.Array
    gradient: jax.Array
    curvature: Curvature
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


def no_curvature(like: jax.Array) -> Curvature:
    """Of parameters ``like``, before any Hessian was computed."""
    matrix = jnp.zeros((like.size, like.size), like.dtype)
    return Curvature(matrix, jnp.zeros((), jnp.bool_))


def minimise(
    own: Problem,
    start: jax.Array,
    unravel: Any,
    linear: jax.Array,
    quadratic: jax.Array,
    accuracy: float,
    curvature: Curvature,
) -> tuple[jax.Array, Curvature]:
    """``argmin_x f_k(x) + linearᵀ x + Σ_j quadratic_j x_j² / 2``; nothing travels.

    Newton's method with Cholesky and backtracking, until the gradient's norm is ``accuracy`` of
    what it was at the start (or rounding ends it): with starts that get better from round to round
    the error falls with them. A Hessian is the work of p/2 gradients; it is computed again when the
    last step by it left more than a tenth of the gradient (Shamanskii's method, where m is chosen
    by what a step gained).

    Args:
      own: ``own_problem``.
      start: ``[p]``, ravelled parameters.
      unravel: Back to parameters.
      linear: ``[p]``.
      quadratic: ``[p]``, >= 0, and above 0 where the loss alone is not strictly convex.
      accuracy: In (0, 1).
      curvature: What an earlier call left, or ``no_curvature``.

    Returns:
      The minimum, ``[p]``, and a curvature for the next call.
    """
    eps = jnp.finfo(start.dtype).eps

    def value_at(x: jax.Array, margins: jax.Array) -> jax.Array:
        return own.loss_at(margins) + jnp.vdot(linear, x) + jnp.vdot(quadratic * x, x) / 2

    def gradient_at(x: jax.Array, margins: jax.Array) -> jax.Array:
        pulled, _ = ravel_pytree(own.pull(own.slopes(margins)))
        return pulled + linear + quadratic * x

    def step(here: _At) -> _At:
        matrix = jax.lax.cond(
            here.curvature.serves,
            lambda: here.curvature.matrix,
            lambda: own.hessian(here.margins).astype(start.dtype),
        )
        factor = jax.scipy.linalg.cho_factor(matrix + jnp.diag(quadratic))
        direction = -jax.scipy.linalg.cho_solve(factor, here.gradient)
        moved, slope = own.margins(unravel(direction)), jnp.vdot(direction, here.gradient)
        slack = 8 * eps * jnp.abs(here.value)

        def along(t: jax.Array) -> jax.Array:
            return value_at(here.x + t * direction, here.margins + t * moved)

        def too_far(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
            t, value, halvings = carry
            return ~(value <= here.value + 1e-4 * t * slope + slack) & (halvings < HALVINGS)

        whole = jnp.ones((), start.dtype)
        t, value, _ = jax.lax.while_loop(
            too_far,
            lambda c: (c[0] / 2, along(c[0] / 2), c[2] + 1),
            (whole, along(whole), jnp.zeros((), jnp.int32)),
        )
        x, margins = here.x + t * direction, here.margins + t * moved
        gradient = gradient_at(x, margins)
        serves = jnp.linalg.norm(gradient) <= KEPT_IF * jnp.linalg.norm(here.gradient)
        return _At(x, margins, value, gradient, Curvature(matrix, serves), here.num_steps + 1)

    margins = own.margins(unravel(start))
    first = _At(
        start,
        margins,
        value_at(start, margins),
        gradient_at(start, margins),
        curvature,
        jnp.zeros((), jnp.int32),
    )
    enough = accuracy * jnp.linalg.norm(first.gradient)
    floor = 4 * eps * (jnp.linalg.norm(linear) + jnp.linalg.norm(quadratic * start))

    def unfinished(here: _At) -> jax.Array:
        size = jnp.linalg.norm(here.gradient)
        return (size > jnp.maximum(enough, floor)) & (here.num_steps < MOST_STEPS)

    found = jax.lax.while_loop(unfinished, step, first)
    return found.x, found.curvature


def on_weights(problem: Problem, strength: jax.Array | float) -> jax.Array:
    """``strength`` for each weight and 0 for the intercept, ``[p]``."""
    zeros = problem.init()
    full = zeros._replace(w=jnp.full_like(zeros.w, strength))
    return ravel_pytree(full)[0]
