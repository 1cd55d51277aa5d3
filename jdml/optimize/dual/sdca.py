"""Stochastic dual coordinate ascent, on its own and as the local solver of distributed methods."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jdml.optimize.base import Method
from jdml.optimize.dual.ascent import Active, Samples, Sampling, ascend, everyone, samples_of
from jdml.optimize.dual.gap import (
    checked_seed,
    dual_to_primal,
    duality_gap,
    first_alpha,
    params_of,
    rows_refusal,
    seed_of,
)

PASSES = 10
"""Passes between two over all samples, and between certificates, which cost about one each."""


class AscentState(NamedTuple):
    """What coordinate ascent resumes from.

    Attributes:
      alpha: ``[n]``.
      u: ``[d]``, ``(1/λn) Σ s_i α_i x_i``; summed anew every ``PASSES`` passes.
      active: Samples not shrunk.
      num_passes: int32.
      squared_norms: ``|x_i|²``, ``[n]``, a constant of the problem.
      key: Of all draws.
    """

    alpha: jax.Array
    u: jax.Array
    active: Active
    num_passes: jax.Array
    squared_norms: jax.Array
    key: jax.Array


@dataclasses.dataclass(frozen=True)
class CoordinateAscent(Method):
    """A step is a pass: n coordinate steps, fewer when samples were shrunk."""

    shrink: bool
    certificate = "duality gap"
    order = "first"
    space = "dual"
    draw: ClassVar[Sampling]

    def check_every(self, problem):
        return PASSES

    @classmethod
    def refusal(cls, problem):
        return rows_refusal(problem)

    def init(self, problem, params):
        alpha = first_alpha(problem, params)
        return AscentState(
            alpha,
            dual_to_primal(problem, alpha),
            everyone(problem.num_samples, problem.dtype),
            jnp.zeros((), jnp.int32),
            problem.rows.squared_norms(),
            jax.random.key(0),
        )

    def step(self, problem, state):
        anew = state.num_passes % PASSES == 0
        u = lax.cond(anew, lambda: dual_to_primal(problem, state.alpha), lambda: state.u)
        active = state.active
        if self.shrink:
            whole = everyone(problem.num_samples, problem.dtype)
            active = Active(
                jnp.where(anew, whole.order, active.order),
                jnp.where(anew, whole.size, active.size),
                active.threshold,
            )
        alpha, u, active = ascend(
            problem.loss,
            self.draw,
            self.shrink,
            samples_of(problem, state.squared_norms),
            state.alpha,
            u,
            active,
            jnp.uint32(problem.num_samples),
            seed_of(state.key, state.num_passes),
        )
        return state._replace(alpha=alpha, u=u, active=active, num_passes=state.num_passes + 1)

    def measure(self, problem, state):
        return duality_gap(problem, state.alpha, state.u)

    def params(self, problem, state):
        return params_of(problem, state.u)


@dataclasses.dataclass(frozen=True)
class SDCA(CoordinateAscent):
    replace: bool
    seed: int = dataclasses.field(compare=False)
    name = "sdca"
    sampling = "stochastic"

    @property
    def draw(self) -> Sampling:  # type: ignore[override]
        return "replacement" if self.replace else "permutation"

    def seeded(self, state):
        return state._replace(key=jax.random.key(self.seed))


def sdca(replace: bool = False, shrink: bool | None = None, seed: int = 0) -> SDCA:
    """``α_i <- α_i + Δ_i``, ``w <- w + s_i Δ_i x_i / λn`` for samples i drawn at random.

    ``Δ_i`` is the loss's closed form: with ``a = x_iᵀ w`` and ``q = s_i |x_i|² / λn`` it maximises
    the dual along ``α_i`` (for the logistic loss: does not lessen it). A step of ``solve`` is a
    pass of n such. With losses of curvature up to 1/γ the gap is ε after
    ``O((n + 1/λγ) log 1/ε)`` of them (in expectation, with replacement, ``|x_i| <= 1``), with
    Lipschitz ones after ``O(n + 1/λε)``.

    Args:
      replace: Whether samples are drawn with replacement; by default each pass is a permutation.
      shrink: Whether samples that stay at a bound are left out, for ten passes at most (hinges; for
        other losses none ever stays). By default in permutations; not possible with replacement.
      seed: Of the drawing.

    For squared, logistic, hinge, squared and smoothed hinge losses with an l2 penalty, or an
    elastic net (Prox-SDCA: ``w = soft(u, l1/l2)``), without an intercept. Certificate: the duality
    gap, ``P(w) - D(α) >= P(w) - P*``. State: ``3n + d`` numbers. On a CPU a pass is one kernel.

    References: Shalev-Shwartz & Zhang, "Stochastic Dual Coordinate Ascent Methods for Regularized
    Loss Minimization", JMLR 2013, and "Accelerated Proximal Stochastic Dual Coordinate Ascent for
    Regularized Loss Minimization", 2014; Hsieh et al., "A Dual Coordinate Descent Method for
    Large-scale Linear SVM", ICML 2008 (permutations, shrinking).
    """
    if replace and shrink:
        raise ValueError(
            "sdca(replace=True, shrink=True): shrinking wants passes; drop one of both."
        )
    shrink = not replace if shrink is None else bool(shrink)
    return SDCA(shrink, bool(replace), checked_seed("sdca", seed))


def local_sdca(
    loss: Any,
    samples: Samples,
    alpha: jax.Array,
    u: jax.Array,
    num_steps: int,
    seed: jax.Array,
    sigma: jax.Array | float = 1.0,
    draw: Sampling = "permutation",
) -> tuple[jax.Array, jax.Array]:
    """What one worker of a distributed dual method does alone, on the samples that it has.

    It ascends the local subproblem of CoCoA+: coordinate steps with ``a = xᵀ(w + σ' Δw)`` and
    ``σ' q`` in place of q. With ``sigma=1`` and all samples it is ``sdca``.

    Args:
      loss: As a problem's.
      samples: ``samples_of`` this worker's problem, with the λn of all workers.
      alpha: Its dual variables, ``[n_k]``.
      u: ``[d]``, of all workers.
      num_steps: Coordinate steps; more than ``n_k`` are several passes.
      seed: uint32; another one at each call and on each worker.
      sigma: σ' > 0.
      draw: "permutation", "replacement" or "cyclic".

    Returns:
      ``(Δα [n_k], Δu [d])`` with ``Δu = Σ_i scale_i Δα_i x_i``, without σ'. Nothing travels.

    Reference: Ma et al., "Adding vs. Averaging in Distributed Primal-Dual Optimization", ICML 2015.
    """
    if num_steps < 0:
        raise ValueError(f"local_sdca(num_steps={num_steps}): expected at least 0.")
    n = alpha.shape[0]
    stretched = samples._replace(scale=sigma * samples.scale, q=sigma * samples.q)

    def some(number, carry):
        alpha, ahead = carry
        steps = jnp.minimum(n, num_steps - number * n).astype(jnp.uint32)
        alpha, ahead, _ = ascend(
            loss,
            draw,
            False,
            stretched,
            alpha,
            ahead,
            everyone(n, u.dtype),
            steps,
            seed + number.astype(jnp.uint32) * jnp.uint32(0x9E3779B9),
        )
        return alpha, ahead

    new, ahead = lax.fori_loop(jnp.int32(0), -(-num_steps // n), some, (alpha, u))
    return new - alpha, (ahead - u) / sigma
