"""Block coordinate descent: all blocks at once and damped (Jacobi), or one after the other."""

import dataclasses

import jax
import jax.numpy as jnp

from jdml.aggregate.linear.feature_cocoa import FeatureState
from jdml.aggregate.linear.margins import bends, columns_refusal, measured, shifted, with_weights
from jdml.optimize.base import Method


@dataclasses.dataclass(frozen=True)
class BlockDescent(Method):
    damping: float | None
    local_steps: int
    certificate = "gradient norm"
    order = "first"
    sampling = "deterministic"

    @classmethod
    def refusal(cls, problem):
        return columns_refusal(problem)

    def init(self, problem, params):
        return FeatureState(params, problem.margins(params))

    def _alone(self, problem):
        """What a block does with the others held: ``(Δ_k [d_k], X_k Δ_k [n])``."""
        loss = problem.loss

        def alone(block, w, margins, y, scale, curved, penalty):
            # An upper bound of |X_kᵀ C X_k|: its largest row sum, or its trace where that is less.
            bound = jnp.maximum(_norm_bound(block, curved), jnp.finfo(w.dtype).tiny)

            def improve(_, carry):
                w, change = carry
                slope = block.rmatvec(scale * loss.derivative(margins + change, y))
                after = penalty.prox(w - slope / bound, 1 / bound)
                return after, change + block.matvec(after - w)

            zero = jnp.zeros_like(margins)
            after, change = jax.lax.fori_loop(0, self.local_steps, improve, (w, zero))
            return after - w, change

        shared = (
            problem.y,
            problem.sample_weight / problem.num_samples,
            bends(problem),
            problem.penalty,
        )
        return alone, shared

    def measure(self, problem, state):
        return measured(problem, state.params, state.margins)


@dataclasses.dataclass(frozen=True)
class Jacobi(BlockDescent):
    name = "jacobi"

    def step(self, problem, state):
        rows = problem.rows
        beta = 1 / max(rows.grid) if self.damping is None else self.damping
        params, margins = shifted(problem, state.params, state.margins)
        alone, shared = self._alone(problem)
        own = rows.parts(params.w)
        moved, changes = rows.each(alone, (own,), (margins, *shared))
        params = with_weights(params, own + beta * moved)
        return FeatureState(params, margins + beta * jnp.sum(changes, axis=0))


@dataclasses.dataclass(frozen=True)
class GaussSeidel(BlockDescent):
    name = "gauss_seidel"

    def step(self, problem, state):
        rows = problem.rows
        num = max(rows.grid)
        params, margins = shifted(problem, state.params, state.margins)
        alone, shared = self._alone(problem)

        def in_turn(block, number, w, turn, margins, *shared):
            zeros = jnp.zeros_like(w), jnp.zeros_like(margins)
            return jax.lax.cond(
                number == turn, lambda: alone(block, w, margins, *shared), lambda: zeros
            )

        def visit(turn, carry):
            own, margins = carry
            parts = (jnp.arange(num), own)
            moved, changes = rows.each(in_turn, parts, (turn, margins, *shared))
            return own + moved, margins + jnp.sum(changes, axis=0)

        own, margins = jax.lax.fori_loop(0, num, visit, (rows.parts(params.w), margins))
        return FeatureState(with_weights(params, own), margins)


def _norm_bound(block, curved):
    """``|X_kᵀ C X_k|_2`` is at most ``max_j Σ_i c_i |x_ij| Σ_l |x_il|``, and at most its trace."""
    absolute = jax.tree.map(jnp.abs, block)  # columns and counts are >= 0 already
    sums = absolute.matvec(jnp.ones(block.shape[1], block.dtype))
    largest = jnp.max(absolute.rmatvec(curved * sums))
    return jnp.minimum(largest, jnp.sum(curved * block.squared_norms()))


def jacobi(damping: float | None = None, local_steps: int = 1) -> Jacobi:
    """``w_k <- w_k + β h_k`` for all blocks k at once, from the same margins.

    ``h_k`` is what block k would do alone, the others held: proximal gradient steps, whose length
    comes from a bound on ``|X_kᵀ C X_k|``, ``C = diag(s_i sup φ'' / n)``. What all do together may
    be too much: with ``β = 1/ω``, ω the most blocks that a sample touches, every round lowers the
    objective.

    Args:
      damping: β in (0, 1]; by default 1/K, which is safe for any X. Of sparse rows
        ``jdml.partition.safe_damping(separability(X, blocks), K)`` may be more.
      local_steps: Steps of a block in a round.

    For what ``feature_cocoa`` is for; the same certificate, state and bytes.

    References: Richtárik & Takáč, "Parallel Coordinate Descent Methods for Big Data Optimization",
    2016; Bertsekas & Tsitsiklis, "Parallel and Distributed Computation", 1989, section 3.2.
    """
    if damping is not None and not 0 < damping <= 1:
        raise ValueError(f"jacobi(damping={damping}): expected a number in (0, 1], or None.")
    return Jacobi(None if damping is None else float(damping), _steps("jacobi", local_steps))


def gauss_seidel(local_steps: int = 1) -> GaussSeidel:
    """``w_k <- w_k + h_k`` for one block after the other, each seeing what those before it did.

    ``h_k`` as in ``jacobi``, undamped; every visit lowers the objective. While a block works the
    others wait: workers share memory, and not time.

    Args:
      local_steps: Steps of a block at each visit.

    For what ``feature_cocoa`` is for; the same certificate and state. Bytes a worker sends per
    round, in which each of K blocks is visited once: K times those of ``feature_cocoa``.

    Reference: Tseng, "Convergence of a Block Coordinate Descent Method for Nondifferentiable
    Minimization", 2001; Beck & Tetruashvili, "On the Convergence of Block Coordinate Descent Type
    Methods", 2013.
    """
    return GaussSeidel(None, _steps("gauss_seidel", local_steps))


def _steps(name: str, local_steps: int) -> int:
    if local_steps < 1:
        raise ValueError(f"{name}(local_steps={local_steps}): expected at least 1.")
    return int(local_steps)
