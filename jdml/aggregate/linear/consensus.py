"""Consensus ADMM of linear models, with local problems solved by Newton's method."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jdml.aggregate.linear.divided import divided_refusal
from jdml.aggregate.linear.local_newton import Curvature, minimise, no_curvature, own_problem
from jdml.optimize.base import Method, Params, stationarity


class ConsensusState(NamedTuple):
    """What it resumes from; p parameters, ravelled where they are per worker.

    Attributes:
      z: The agreed parameters.
      x: ``[K, p]``, each worker's own.
      dual: ``[K, p]``, scaled: u.
      rho: The penalty as it stands.
      curvature: ``[K, p, p]``, each worker's own Hessian, and whether it serves, ``[K]``.
    """

    z: Params
    x: jax.Array
    dual: jax.Array
    rho: jax.Array
    curvature: Curvature


@dataclasses.dataclass(frozen=True)
class Consensus(Method):
    rho: float | None
    over_relaxation: float
    adaptive: bool
    accuracy: float
    name = "consensus"
    certificate = "gradient norm"
    order = "second"
    sampling = "deterministic"

    @classmethod
    def refusal(cls, problem):
        if not problem.loss.differentiable:
            return f"the {problem.loss.name} loss has no gradient at its corner"
        return divided_refusal(problem, "sample")

    def init(self, problem, params):
        flat, _ = ravel_pytree(params)
        num = max(problem.rows.grid)
        if self.rho is None:
            # The mean eigenvalue of the Hessian of the loss: workers' f_k are alike to it.
            bends = (
                problem.loss.curvature_product(
                    problem.margins(params), problem.y, jnp.ones_like(problem.margins(params))
                )
                if problem.loss.num_outputs is None
                else jnp.full_like(problem.sample_weight, problem.loss.smoothness / 2)
            )
            norms = problem.rows.squared_norms() + problem.intercept
            rho = jnp.mean(problem.sample_weight * bends * norms) / problem.rows.shape[1]
            rho = jnp.where(rho > 0, rho, 1.0)
        else:
            rho = jnp.asarray(self.rho)
        zeros = jnp.zeros((num, flat.size), flat.dtype)
        curvature = jax.tree.map(lambda x: jnp.broadcast_to(x, (num, *x.shape)), no_curvature(flat))
        return ConsensusState(params, zeros + flat, zeros, rho.astype(flat.dtype), curvature)

    def step(self, problem, state):
        rows = problem.rows
        num = max(rows.grid)
        flat, unravel = ravel_pytree(state.z)

        def alone(block, y, weight, x, dual, curvature, flat, rho, penalty):
            own = own_problem(problem, block, y, weight, penalty)
            linear, quadratic = -rho * (flat - dual), jnp.full_like(flat, rho)
            return minimise(own, x, unravel, linear, quadratic, self.accuracy, curvature)

        samples = rows.parts(problem.y), rows.parts(problem.sample_weight)
        x, curvature = rows.each(
            alone,
            (*samples, state.x, state.dual, state.curvature),
            (flat, state.rho, problem.penalty),
        )
        relaxed = self.over_relaxation * x + (1 - self.over_relaxation) * flat
        mean = jnp.sum(relaxed + state.dual, axis=0) / num
        # f_k are K times the worker's share of P, so that R beside their sum is K R.
        z = problem.prox(unravel(mean), 1 / state.rho)
        new, _ = ravel_pytree(z)
        dual = state.dual + relaxed - new
        rho = state.rho
        if self.adaptive:
            primal = jnp.sqrt(jnp.sum((x - new) ** 2))
            gap = rho * math.sqrt(num) * jnp.linalg.norm(new - flat)
            factor = jnp.where(primal > 10 * gap, 2.0, jnp.where(gap > 10 * primal, 0.5, 1.0))
            # At the end both are rounding errors, whose ratio says nothing.
            tiny = 100 * jnp.finfo(rho.dtype).eps * (1 + jnp.linalg.norm(new)) * math.sqrt(num)
            factor = jnp.where(primal > tiny, factor, 1.0).astype(rho.dtype)
            rho, dual = rho * factor, dual / factor
        return ConsensusState(z, x, dual, rho, curvature)

    def measure(self, problem, state):
        value, gradient = problem.loss_and_gradient(state.z)
        value = value + problem.penalty.value(state.z.w)
        return value, stationarity(problem, state.z, gradient)

    def params(self, problem, state):
        return state.z


def consensus(
    rho: float | None = None,
    over_relaxation: float = 1.6,
    adaptive: bool = True,
    accuracy: float = 1e-2,
) -> Consensus:
    """``x_k <- argmin f_k(x) + ρ/2 |x - z + u_k|²``, ``z <- prox_{R/ρ}(mean_k(x̂_k + u_k))``.

    ``x̂_k = a x_k + (1 - a) z``, ``u_k <- u_k + x̂_k - z``; f_k is the mean loss of the worker's
    samples, weighted so that the mean of all f_k is the problem's. The local problem is solved by
    Newton's method from where the worker stands, which takes a step or two, mostly by a Hessian of
    an earlier round. ``consensus_admm`` is
    the same with a few steps of any optimiser, for any model.

    Args:
      rho: ρ > 0; by default the mean eigenvalue of the loss's Hessian at the start.
      over_relaxation: a, in (0, 2).
      adaptive: Doubles ρ when the primal residual is over 10 times the dual one, halves it in the
        opposite case.
      accuracy: Share of the local gradient's norm at the start of a round that may be left.

    For differentiable losses and any penalty or constraint, with an intercept or without, on rows
    divided by sample. Certificate: ``|∇P(z)|``, or the prox-gradient norm, which costs a pass.
    State: p parameters, and ``2 p + p²`` on each worker.

    Bytes a worker sends per round: an all-reduce of p elements, ``2 (K-1)/K · p`` times their size,
    and one of a scalar if adaptive. A certificate adds p elements and a few scalars.

    Reference: Boyd et al., "Distributed Optimization and Statistical Learning via the Alternating
    Direction Method of Multipliers", 2011, sections 3.4, 7.1 and 8.2.
    """
    if rho is not None and not (math.isfinite(rho) and rho > 0):
        raise ValueError(f"consensus(rho={rho}): expected a number > 0, or None.")
    if not 0 < over_relaxation < 2:
        raise ValueError(f"consensus(over_relaxation={over_relaxation}): expected 0 < a < 2.")
    if not 0 < accuracy < 1:
        raise ValueError(f"consensus(accuracy={accuracy}): expected a number in (0, 1).")
    return Consensus(
        None if rho is None else float(rho), float(over_relaxation), bool(adaptive), float(accuracy)
    )
