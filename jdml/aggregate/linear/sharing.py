"""Sharing ADMM: workers have columns, and agree on what their margins are to add up to."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdml.aggregate.linear.divided import divided_refusal
from jdml.aggregate.linear.margins import measured, with_weights
from jdml.optimize.base import Method, Params

NEWTON_STEPS = 50


class SharingState(NamedTuple):
    """What it resumes from.

    Attributes:
      params: Each worker has its weights.
      margins: ``[n]``, ``Σ_k X_k w_k``.
      share: ``[n]``, z̄: a K-th of the margins that were agreed on.
      dual: ``[n]``, scaled, the same on every worker.
      rho: The penalty as it stands.
      own: ``[K, n]``, each worker's own margins.
      vectors: ``[K, d_k, d_k]``, of ``X_kᵀ X_k``, with ``values`` ``[K, d_k]``.
      values: See vectors.
    """

    params: Params
    margins: jax.Array
    share: jax.Array
    dual: jax.Array
    rho: jax.Array
    own: jax.Array
    vectors: jax.Array
    values: jax.Array


@dataclasses.dataclass(frozen=True)
class Sharing(Method):
    rho: float | None
    adaptive: bool
    name = "sharing"
    certificate = "gradient norm"
    order = "second"
    sampling = "deterministic"

    @classmethod
    def refusal(cls, problem):
        if problem.loss.num_outputs is not None:
            return "it takes one margin a sample"
        if problem.penalty.name not in ("l2", "none"):
            return (
                "a worker's own problem is solved as a linear system, which "
                f"{problem.penalty.name} does not give; feature_cocoa takes it"
            )
        if not problem.loss.differentiable:
            return f"the {problem.loss.name} loss has no gradient to certify with"
        if problem.intercept:
            return "the intercept is nobody's column; append a column of ones to X"
        return divided_refusal(problem, "feature")

    def init(self, problem, params):
        rows = problem.rows
        num = max(rows.grid)
        ones = jnp.ones(rows.shape[0], rows.dtype)

        def alone(block, w, ones):
            values, vectors = jnp.linalg.eigh(block.gram(ones))
            return block.matvec(w), vectors, jnp.maximum(values, 0)

        own, vectors, values = rows.each(alone, (rows.parts(params.w),), (ones,))
        margins = jnp.sum(own, axis=0)
        if self.rho is None:
            bend = problem.loss.curvature(margins, problem.y)
            rho = num * jnp.mean(problem.sample_weight * bend) / problem.num_samples
            rho = jnp.where(rho > 0, rho, num / problem.num_samples)
        else:
            rho = jnp.asarray(self.rho)
        rho = rho.astype(rows.dtype)
        zeros = jnp.zeros_like(margins)
        return SharingState(params, margins, margins / num, zeros, rho, own, vectors, values)

    def step(self, problem, state):
        rows, num = problem.rows, max(problem.rows.grid)

        def alone(block, own, vectors, values, shift, rho, l2):
            # argmin l2/2 |w|² + rho/2 |X w - (own + shift)|²
            right = rho * block.rmatvec(own + shift)
            bend = l2 + rho * values
            inverse = jnp.where(bend > 0, 1 / jnp.where(bend > 0, bend, 1), 0)
            w = vectors @ (inverse * (vectors.T @ right))
            return w, block.matvec(w)

        shift = state.share - state.margins / num - state.dual
        w, own = rows.each(
            alone,
            (state.own, state.vectors, state.values),
            (shift, state.rho, problem.penalty.strong_convexity),
        )
        margins = jnp.sum(own, axis=0)
        mean = margins / num
        weight = problem.sample_weight / problem.num_samples
        agreed = loss_prox(
            problem.loss, margins + num * state.dual, weight * num / state.rho, problem.y
        )
        share = agreed / num
        dual = state.dual + mean - share
        rho = state.rho
        if self.adaptive:
            primal = jnp.linalg.norm(mean - share)
            gap = jnp.linalg.norm(share - state.share)
            factor = jnp.where(primal > 10 * gap, 2.0, jnp.where(gap > 10 * primal, 0.5, 1.0))
            tiny = 100 * jnp.finfo(rho.dtype).eps * (1 + jnp.linalg.norm(share))
            factor = jnp.where(primal + gap > tiny, factor, 1.0).astype(rho.dtype)
            rho, dual = rho * factor, dual / factor
        params = with_weights(state.params, w)
        return state._replace(
            params=params, margins=margins, share=share, dual=dual, rho=rho, own=own
        )

    def measure(self, problem, state):
        return measured(problem, state.params, state.margins)


def loss_prox(loss: Any, at: jax.Array, q: jax.Array, y: jax.Array) -> jax.Array:
    """``argmin_a φ(a, y) + (a - at)² / 2q`` for each sample; q >= 0, and 0 leaves ``at``.

    The root of ``a - at + q φ'(a)``, which rises, in a bracket: each step tries Newton's point and
    the middle, and keeps the better one.
    """

    def slope(a: jax.Array) -> jax.Array:
        return a - at + q * loss.derivative(a, y)

    other = at - q * loss.derivative(at, y)

    def narrowed(a, low, high):
        value = slope(a)
        return jnp.abs(value), jnp.where(value <= 0, a, low), jnp.where(value >= 0, a, high)

    def closer(_, carry):
        a, low, high = carry
        newton = a - slope(a) / (1 + q * loss.curvature(a, y))
        newton = jnp.clip(newton, low, high)
        off, low, high = narrowed(newton, low, high)
        middle = (low + high) / 2
        off_middle, low, high = narrowed(middle, low, high)
        return jnp.where(off <= off_middle, newton, middle), low, high

    first = at, jnp.minimum(at, other), jnp.maximum(at, other)
    return jax.lax.fori_loop(0, NEWTON_STEPS, closer, first)[0]


def sharing(rho: float | None = None, adaptive: bool = True) -> Sharing:
    """``min Σ_k R(w_k) + ℓ(Σ_k X_k w_k)`` by ADMM on the margins' mean.

    ``w_k <- argmin R(w_k) + ρ/2 |X_k w_k - X_k w_k^t - z̄ + ā + u|²``, solved exactly from one
    decomposition of ``X_kᵀ X_k``; ``z̄ <- argmin ℓ(K z̄) + Kρ/2 |z̄ - ā - u|²``, sample by sample;
    ``u <- u + ā - z̄``, with ā the mean of the workers' margins.

    Args:
      rho: ρ > 0; by default K times the mean curvature of the loss at the start.
      adaptive: Doubles ρ when the primal residual is over 10 times the dual one's distance, halves
        it in the opposite case.

    For differentiable losses with one margin a sample, an l2 penalty or none, without an intercept,
    on rows divided by feature. Certificate: ``|∇P|``. State: n numbers on each worker five times,
    and ``d_k²``.

    Bytes a worker sends per round: an all-reduce of n margins, ``2 (K-1)/K · n`` times their size.
    A certificate adds a few scalars.

    Reference: Boyd et al., "Distributed Optimization and Statistical Learning via the Alternating
    Direction Method of Multipliers", 2011, sections 7.3 and 8.3.
    """
    if rho is not None and not (math.isfinite(rho) and rho > 0):
        raise ValueError(f"sharing(rho={rho}): expected a number > 0, or None.")
    return Sharing(None if rho is None else float(rho), bool(adaptive))
