"""CoCoA by feature: every worker fits its own columns to margins that all of them know."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdml.aggregate.linear.margins import bends, columns_refusal, measured, shifted, with_weights
from jdml.optimize.base import Method, Params


class FeatureState(NamedTuple):
    """What methods by feature resume from.

    Attributes:
      params: Each worker has its weights.
      margins: ``[n]``, on every worker.
    """

    params: Params
    margins: jax.Array


@dataclasses.dataclass(frozen=True)
class FeatureCoCoA(Method):
    gamma: float | None
    sigma: float | None
    passes: int
    name = "feature_cocoa"
    certificate = "gradient norm"
    order = "first"
    sampling = "deterministic"

    @classmethod
    def refusal(cls, problem):
        return columns_refusal(problem)

    def init(self, problem, params):
        return FeatureState(params, problem.margins(params))

    def step(self, problem, state):
        rows = problem.rows
        num = max(rows.grid)
        gamma = 1 / num if self.gamma is None else self.gamma
        sigma = gamma * num if self.sigma is None else self.sigma
        params, margins = shifted(problem, state.params, state.margins)

        def alone(block, w, slopes, curved, penalty):
            columns, dim = block.T, w.shape[0]
            heights = block.square().rmatvec(curved)
            heights = jnp.where(heights > 0, heights, 1.0)

            def move(at, carry):
                w, ahead = carry
                j = at % dim
                # The slope of the subproblem at X_k Δ; ``curved`` has σ' in it.
                slope = columns.dot_of(j, lambda v, c, r: v + c * r, slopes, curved, ahead)
                after = penalty.prox(w[j] - slope / heights[j], 1 / heights[j])
                return w.at[j].set(after), columns.add(ahead, j, after - w[j])

            new, change = jax.lax.fori_loop(0, self.passes * dim, move, (w, jnp.zeros_like(slopes)))
            return new - w, change

        own = rows.parts(params.w)
        moved, changes = rows.each(
            alone, (own,), (problem.slopes(margins), sigma * bends(problem), problem.penalty)
        )
        params = with_weights(params, own + gamma * moved)
        return FeatureState(params, margins + gamma * jnp.sum(changes, axis=0))

    def measure(self, problem, state):
        return measured(problem, state.params, state.margins)


def feature_cocoa(
    gamma: float | None = 1.0, sigma: float | None = None, passes: int = 1
) -> FeatureCoCoA:
    """``w_k <- w_k + γ Δ_k`` on each of K workers, ``a <- a + γ Σ_k X_k Δ_k``.

    ``Δ_k`` is about what minimises ``<∇ℓ(a), X_k Δ> + σ'/2 |X_k Δ|²_C + R(w_k + Δ)``, by passes of
    coordinate descent; ``ℓ`` is the mean loss of the margins a, ``C = diag(s_i sup φ'' / n)``
    bounds its curvature, and σ' makes good what the others do meanwhile. Every round lowers the
    objective where ``σ' >= γK``.

    Args:
      gamma: In (0, 1]; None for 1/K.
      sigma: σ' > 0; by default γ K, which is safe.
      passes: Over the worker's columns, in a round.

    For differentiable losses of bounded curvature with one margin a sample, penalties and
    constraints that are sums over coordinates, with an intercept or without, on rows divided by
    feature. Certificate: ``|∇P|``, or the prox-gradient norm. State: d numbers over all workers and
    n on each.

    Bytes a worker sends per round: an all-reduce of n margins, ``2 (K-1)/K · n`` times their size.
    A certificate adds a few scalars.

    Reference: Smith et al., "CoCoA: A General Framework for Communication-Efficient Distributed
    Optimization", JMLR 2018 (the primal form, for lasso and its like).
    """
    if gamma is not None and not 0 < gamma <= 1:
        raise ValueError(
            f"feature_cocoa(gamma={gamma}): expected a number in (0, 1], or None for 1/K."
        )
    if sigma is not None and not (math.isfinite(sigma) and sigma > 0):
        raise ValueError(f"feature_cocoa(sigma={sigma}): expected a number > 0, or None for γ K.")
    if passes < 1:
        raise ValueError(f"feature_cocoa(passes={passes}): expected at least 1.")
    return FeatureCoCoA(
        None if gamma is None else float(gamma),
        None if sigma is None else float(sigma),
        int(passes),
    )
