"""Newton's method on the dual: all samples, second order."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.sparse.linalg import cg

from jdml.optimize.base import Method
from jdml.optimize.dual.ascent import soft
from jdml.optimize.dual.box import bounds, free, inside, moved, off_by
from jdml.optimize.dual.gap import (
    dual_refusal,
    dual_to_primal,
    dual_value,
    duality_gap,
    first_alpha,
    params_of,
)

HALVINGS = 30
"""Of a step, before it is given up."""
RIDGE = 1e-3
"""Curvature added per distance from the optimum: hinges have singular Hessians."""


class DualNewtonState(NamedTuple):
    """What dual Newton resumes from.

    Attributes:
      alpha: ``[n]``.
      u: ``[d]``.
      value: ``D(α)``.
    """

    alpha: jax.Array
    u: jax.Array
    value: jax.Array


@dataclasses.dataclass(frozen=True)
class DualNewton(Method):
    inner_steps: int
    name = "dual_newton"
    certificate = "duality gap"
    order = "second"
    sampling = "deterministic"
    space = "dual"

    @classmethod
    def refusal(cls, problem):
        return dual_refusal(problem)

    def init(self, problem, params):
        if problem.loss.dual_open:
            alpha = problem.loss.dual_point(problem.margins(params), problem.y)
            alpha = inside(problem.loss, alpha.astype(problem.dtype), problem.y)
        else:
            alpha = first_alpha(problem, params)
        u = dual_to_primal(problem, alpha)
        return DualNewtonState(alpha, u, dual_value(problem, alpha, u))

    def step(self, problem, state):
        loss, weight, n = problem.loss, problem.sample_weight, problem.num_samples
        alpha = state.alpha
        low, high = bounds(loss, problem.y)
        # Everything times n: the gradient of -nD is s (a - slope).
        margins = problem.margins(params_of(problem, state.u))
        gradient = weight * (margins - loss.dual_slope(alpha, problem.y))
        distance = off_by(alpha, gradient, low, high)
        at_large = free(alpha, gradient, low, high)
        change = self._direction(problem, state, gradient, at_large, jnp.minimum(distance, 1))

        def tried(size):
            new = moved(loss, alpha, size * change, low, high)
            u = dual_to_primal(problem, new)
            return DualNewtonState(new, u, dual_value(problem, new, u))

        def refused(carry):
            size, new = carry
            gain = jnp.vdot(gradient, alpha - new.alpha) / n
            return ~(new.value >= state.value + 1e-4 * gain) & (size > 0.5**HALVINGS)

        one = jnp.ones((), problem.dtype)
        _, new = lax.while_loop(refused, lambda c: (c[0] / 2, tried(c[0] / 2)), (one, tried(one)))
        return jax.tree.map(lambda a, b: jnp.where(new.value > state.value, a, b), new, state)

    def _direction(self, problem, state, gradient, at_large, distance):
        """``-H⁻¹ gradient`` on the variables that are free, 0 on the others; by CG."""
        weight, penalty = problem.sample_weight, problem.penalty
        strength = penalty.l2 * problem.num_samples
        curvature = weight * problem.loss.dual_curvature(state.alpha, problem.y) + RIDGE * distance
        kept = jnp.ones_like(state.u)
        if penalty.name != "l2":
            kept = (soft(state.u, penalty.l1 / penalty.l2) != 0).astype(kept.dtype)

        def hessian(v):
            v = jnp.where(at_large, v, 0)
            product = problem.rows.matvec(kept * problem.rows.rmatvec(weight * v)) / strength
            return jnp.where(at_large, curvature * v + weight * product, v)

        diagonal = curvature + weight**2 * problem.rows.squared_norms() / strength
        diagonal = jnp.where(at_large & (diagonal > 0), diagonal, 1)
        # Solved the better the nearer the optimum is: so convergence stays superlinear.
        return cg(
            hessian,
            jnp.where(at_large, -gradient, 0),
            tol=jnp.minimum(0.1, distance),
            maxiter=self.inner_steps,
            M=lambda v: v / diagonal,
        )[0]

    def measure(self, problem, state):
        return duality_gap(problem, state.alpha, state.u)

    def params(self, problem, state):
        return params_of(problem, state.u)


def dual_newton(inner_steps: int = 200) -> DualNewton:
    """``α <- project(α + t d)``, ``H_FF d_F = -∇_F``, of ``-D`` and all samples.

    F are the variables that are not held at a bound, ``∇ = s (Xw - ∂(-φ*)) / n`` and
    ``H = (diag(s φ*'') + S X Xᵀ S / λn) / n``, whose products take one with X and one with Xᵀ. It
    is the semi-smooth Newton method of ``α = project(α - ∇)`` (the primal-dual active set method),
    made to rise in every step by halving t. Superlinear near the optimum.

    Args:
      inner_steps: Steps of conjugate gradients at most.

    For the losses and penalties of ``sdca``. Certificate: the duality gap. State: ``n + d``
    numbers.

    References: Bertsekas, "Projected Newton Methods for Optimization Problems with Simple
    Constraints", SIAM J. Control Optim. 1982; Hintermüller, Ito & Kunisch, "The Primal-Dual Active
    Set Strategy as a Semismooth Newton Method", SIAM J. Optim. 2002.
    """
    if inner_steps < 1:
        raise ValueError(f"dual_newton(inner_steps={inner_steps}): expected at least 1.")
    return DualNewton(int(inner_steps))
