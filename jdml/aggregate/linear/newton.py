"""DANE and GIANT: Newton with each worker's own Hessian, and the mean of the directions."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jdml.aggregate.linear.divided import divided_refusal
from jdml.aggregate.linear.local_newton import (
    minimise,
    no_curvature,
    on_weights,
    own_problem,
)
from jdml.optimize.base import Method, dot, norm, smooth_refusal
from jdml.optimize.first_order.majorise import point
from jdml.optimize.second_order.descent import at, backtrack


@dataclasses.dataclass(frozen=True)
class MeanDirection(Method):
    """``p <- p + t mean_k d_k``, t by backtracking on the objective of all."""

    certificate = "gradient norm"
    order = "second"
    sampling = "deterministic"

    @classmethod
    def refusal(cls, problem):
        if (reason := smooth_refusal(problem)) is not None:
            return reason
        strength = problem.penalty.strong_convexity
        if not isinstance(strength, jax.core.Tracer) and not np.all(np.asarray(strength) > 0):
            return "without a penalty l2(strength > 0) a worker's own Hessian may be singular"
        return divided_refusal(problem, "sample")

    def init(self, problem, params):
        return at(problem, point(problem, params))

    def step(self, problem, state):
        rows = problem.rows
        gradient, unravel = ravel_pytree(state.gradient)
        here, _ = ravel_pytree(state.params)
        # The intercept is not penalised; where a worker's samples are all on one side, this keeps
        # its Hessian definite.
        l2 = problem.penalty.strong_convexity
        quadratic = on_weights(problem, l2)
        quadratic = jnp.where(quadratic > 0, quadratic, 1e-6 * l2).astype(here.dtype)

        def alone(block, y, weight, margins, here, gradient, quadratic, penalty):
            own = own_problem(problem, block, y, weight, penalty)
            return self._direction(own, margins, here, gradient, quadratic, unravel)

        parts = (problem.y, problem.sample_weight, state.point.margins)
        found = rows.each(
            alone, tuple(map(rows.parts, parts)), (here, gradient, quadratic, problem.penalty)
        )
        direction = unravel(jnp.sum(found, axis=0) / max(rows.grid))
        return backtrack(problem, state, direction, dot(state.gradient, direction))

    def _direction(self, own, margins, here, gradient, quadratic, unravel):
        raise NotImplementedError

    def measure(self, problem, state):
        return state.value, norm(state.gradient)


@dataclasses.dataclass(frozen=True)
class GIANT(MeanDirection):
    name = "giant"

    def _direction(self, own, margins, here, gradient, quadratic, unravel):
        matrix = own.hessian(margins) + jnp.diag(quadratic)
        return -jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(matrix), gradient)


@dataclasses.dataclass(frozen=True)
class DANE(MeanDirection):
    eta: float
    mu: float
    accuracy: float
    name = "dane"

    def _direction(self, own, margins, here, gradient, quadratic, unravel):
        slope, _ = ravel_pytree(own.pull(own.slopes(margins)))
        # h_k = f_k + R; its gradient at the start is exchanged for η times that of all.
        whole = quadratic + self.mu
        linear = self.eta * gradient - slope - whole * here
        first = no_curvature(here)
        return minimise(own, here, unravel, linear, whole, self.accuracy, first)[0] - here


def giant() -> GIANT:
    """``p <- p - t mean_k (∇²h_k)⁻¹ ∇P``, ``h_k`` the objective of the worker's samples alone.

    The mean of the inverses stands for the inverse of the mean, which it is the nearer the more
    samples a worker has; t by backtracking. With one worker it is Newton's method.

    For differentiable losses with an l2 penalty, on rows divided by sample. Certificate: ``|∇P|``.
    State: p parameters and n margins over all workers. A step costs ``n d² / K`` operations on each
    worker and ``d³/3`` for its factor.

    Bytes a worker sends per round: an all-reduce of p elements for the direction, one of p and a
    scalar for gradient and objective, each ``2 (K-1)/K`` of it, and a scalar for each trial of the
    step size.

    Reference: Wang, Roosta, Xu & Mahoney, "GIANT: Globally Improved Approximate Newton Method for
    Distributed Optimization", NeurIPS 2018.
    """
    return GIANT()


def dane(eta: float = 1.0, mu: float = 0.0, accuracy: float = 1e-2) -> DANE:
    """``p <- p + t mean_k (p_k - p)``, ``p_k = argmin h_k(q) - <∇h_k(p) - η∇P(p), q> + μ/2|q-p|²``.

    ``h_k`` is the objective of the worker's samples alone; its own slope is exchanged for that of
    all, so that the minimum is a fixed point. The local problem is solved by Newton's method. t is
    by backtracking, which the paper leaves out: with t = 1 too small a μ may diverge.

    Args:
      eta: η > 0.
      mu: μ >= 0; more is safer and slower where workers' samples differ.
      accuracy: Share of the local gradient's norm that may be left.

    For differentiable losses with an l2 penalty, on rows divided by sample. Certificate: ``|∇P|``.
    State and bytes: as ``giant``.

    Reference: Shamir, Srebro & Zhang, "Communication-Efficient Distributed Optimization using an
    Approximate Newton-type Method", ICML 2014.
    """
    if not (math.isfinite(eta) and eta > 0 and math.isfinite(mu) and mu >= 0):
        raise ValueError(f"dane(eta={eta}, mu={mu}): expected eta > 0 and mu >= 0.")
    if not 0 < accuracy < 1:
        raise ValueError(f"dane(accuracy={accuracy}): expected a number in (0, 1).")
    return DANE(float(eta), float(mu), float(accuracy))
