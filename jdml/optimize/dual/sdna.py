"""Stochastic dual Newton ascent: the dual is maximised over one block of samples at a time."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jdml.optimize.base import Method
from jdml.optimize.dual.ascent import Samples, samples_of, soft
from jdml.optimize.dual.box import bounds, free, inside, moved, off_by
from jdml.optimize.dual.gap import (
    checked_seed,
    dual_to_primal,
    duality_gap,
    first_alpha,
    params_of,
    rows_refusal,
)

ROUNDS = 20
"""Newton steps within a block at most; squared losses take one."""
RIDGES = (1e-5, 1e-3, 0.1, 1.0)
"""Of the kernel's diagonal, added to it for losses without curvature of their own."""
SIZES = tuple(0.5**power for power in range(12))
"""Step sizes of which each round takes the best."""


class SDNAState(NamedTuple):
    """What SDNA resumes from.

    Attributes:
      alpha: ``[n]``.
      u: ``[d]``.
      num_passes: int32.
      key: Of all draws.
    """

    alpha: jax.Array
    u: jax.Array
    num_passes: jax.Array
    key: jax.Array


@dataclasses.dataclass(frozen=True)
class SDNA(Method):
    block: int
    seed: int = dataclasses.field(compare=False)
    name = "sdna"
    certificate = "duality gap"
    order = "second"
    sampling = "stochastic"
    space = "dual"

    @classmethod
    def refusal(cls, problem):
        return rows_refusal(problem)

    def check(self, problem):
        super().check(problem)
        if self.block > problem.num_samples:
            raise ValueError(
                f"sdna(block={self.block}): the problem has {problem.num_samples} samples; "
                "expected at most as many."
            )

    def init(self, problem, params):
        alpha = first_alpha(problem, params)
        if problem.loss.dual_open:
            alpha = problem.loss.dual_point(problem.margins(params), problem.y)
            alpha = inside(problem.loss, alpha.astype(problem.dtype), problem.y)
        u = dual_to_primal(problem, alpha)
        return SDNAState(alpha, u, jnp.zeros((), jnp.int32), jax.random.key(0))

    def seeded(self, state):
        return state._replace(key=jax.random.key(self.seed))

    def step(self, problem, state):
        samples = samples_of(problem)
        n, size = problem.num_samples, self.block
        order = jax.random.permutation(jax.random.fold_in(state.key, state.num_passes), n)
        # The last block is filled up from the first, of other samples.
        order = jnp.resize(order, (-(-n // size), size))

        def one(carry, chosen):
            alpha, u = carry
            part = samples.rows.take(chosen)
            block = samples._replace(
                rows=part,
                y=samples.y[chosen],
                scale=samples.scale[chosen],
                q=samples.q[chosen],
            )
            new = maximise_block(
                problem.loss, block, problem.sample_weight[chosen], alpha[chosen], u
            )
            u = u + part.rmatvec(block.scale * (new - alpha[chosen]))
            return (alpha.at[chosen].set(new), u), None

        u = dual_to_primal(problem, state.alpha)
        (alpha, u), _ = lax.scan(one, (state.alpha, u), order)
        return SDNAState(alpha, u, state.num_passes + 1, state.key)

    def measure(self, problem, state):
        return duality_gap(problem, state.alpha, state.u)

    def params(self, problem, state):
        return params_of(problem, state.u)


def maximise_block(
    loss: Any, block: Samples, weight: jax.Array, alpha: jax.Array, u: jax.Array
) -> jax.Array:
    """The best α of a block, ``[τ]``, the others as they are: projected Newton steps.

    It minimises ``Σ s φ*(-α) + aᵀ(s Δ) + (s Δ)ᵀ X Xᵀ (s Δ) / 2λn``, which with an l2 penalty is
    what the block adds to ``-nD``, and is above it with an elastic net.
    """
    low, high = bounds(loss, block.y)
    margins = block.rows.matvec(soft(u, block.kappa))
    # Hinges curve by the kernel alone. Of more samples than columns it is singular, and Newton's
    # step goes to a far corner of the box, along what it does not see.
    least = float(jnp.finfo(alpha.dtype).eps) ** 0.5
    ridges = (least,) if loss.differentiable else (least, *RIDGES)
    # s² / λn = s · scale
    kernel = weight[:, None] * block.rows.products() * block.scale

    def gradient(new):
        return weight * (margins - loss.dual_slope(new, block.y)) + kernel @ (new - alpha)

    def objective(new):
        change = new - alpha
        terms = jnp.where(weight > 0, weight * loss.conjugate(new, block.y), 0)
        return jnp.sum(terms + weight * margins * change + change * (kernel @ change) / 2)

    def unfinished(carry):
        _, distance, number = carry
        return (distance > 8 * jnp.finfo(alpha.dtype).eps) & (number < ROUNDS)

    def improve(carry):
        new, _, number = carry
        slope = gradient(new)
        at_large = free(new, slope, low, high)
        curved = weight * loss.dual_curvature(new, block.y)
        own = 1e-8 + jnp.diag(kernel)
        both = at_large[:, None] & at_large
        inner = jnp.where(both, kernel, 0)

        def along(ridge):
            hessian = inner + jnp.diag(jnp.where(at_large, curved + ridge * own, 1))
            change = jnp.linalg.solve(hessian, jnp.where(at_large, -slope, 0))
            sizes = jnp.asarray(SIZES, alpha.dtype)
            return jax.vmap(lambda t: moved(loss, new, t * change, low, high))(sizes)

        tries = jnp.concatenate([new[None], *map(along, ridges)])
        best = tries[jnp.argmin(jax.vmap(objective)(tries))]
        left = off_by(best, gradient(best), low, high)
        # Nothing better was found: rounding, and the end.
        return best, jnp.where(jnp.all(best == new), 0.0, left), number + 1

    first = alpha, jnp.full((), jnp.inf, alpha.dtype), jnp.zeros((), jnp.int32)
    return lax.while_loop(unfinished, improve, first)[0]


def sdna(block: int = 32, seed: int = 0) -> SDNA:
    """``α_S <- argmax D`` over a block S of τ samples, all others held, S by S.

    Within a block the curvature is exact, ``diag(s φ*'') + S X_S X_Sᵀ S / λn``, so that it needs
    far fewer passes than ``sdca`` where samples are alike. A step of ``solve`` is a pass, a
    permutation cut into blocks; each takes ``O(τ² d + τ³)``.

    Args:
      block: τ, from 1 (SDCA) to n.
      seed: Of the permutations.

    For the losses and penalties of ``sdca``; with an elastic net, the penalty's conjugate is
    majorised by that of its l2 part. Certificate: the duality gap. State: ``n + d`` numbers.

    Reference: Qu, Richtárik, Takáč & Fercoq, "SDNA: Stochastic Dual Newton Ascent for Empirical
    Risk Minimization", ICML 2016.
    """
    if block < 1:
        raise ValueError(f"sdna(block={block}): expected at least 1.")
    return SDNA(int(block), checked_seed("sdna", seed))
