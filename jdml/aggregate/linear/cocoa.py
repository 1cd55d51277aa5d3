"""CoCoA and CoCoA+: every worker ascends the dual on its own samples, and says what w gained."""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jdml.aggregate.linear.divided import divided_refusal
from jdml.aggregate.linear.local_dual import LocalSDCA, LocalSolver
from jdml.communicate import ErrorFeedback, all_reduce_mean
from jdml.optimize.base import Method
from jdml.optimize.dual.ascent import Samples, samples_of, soft
from jdml.optimize.dual.gap import (
    checked_seed,
    dual_refusal,
    dual_to_primal,
    dual_value,
    duality_gap,
    params_of,
    seed_of,
)

SPREAD = 0x85EBCA6B
"""Odd, so that seeds of workers differ; worker 0 has the round's own."""
STEPS = (0.0, *(2.0**power for power in range(-5, 2)))
"""Along which a search looks for the primal point, as parts of the way to the workers' own."""
LEAST_SIGMA = 0.25
"""σ' of a search, by default."""
SLOW = 0.9
"""A round that leaves more of the gap makes the next one more careful."""


class CoCoAState(NamedTuple):
    """What CoCoA resumes from.

    Attributes:
      alpha: ``[K, n_k]``, each worker's own.
      u: ``[d]``, ``(1/λn) Σ s_i α_i x_i`` as the workers know it, the same on all.
      num_rounds: int32.
      key: Of all draws.
      residual: ``[K, d]`` f32, what a codec has not said yet; ``()`` without one.
      sigma: σ' of the next round where it is measured or searched, else ``()``.
      v: ``[d]``, where P was least, in u's place; this and what follows where steps are searched.
      value: P there.
      dual: ``D(α)``.
    """

    alpha: jax.Array
    u: jax.Array
    num_rounds: jax.Array
    key: jax.Array
    residual: Any
    sigma: Any
    v: Any = ()
    value: Any = ()
    dual: Any = ()


@dataclasses.dataclass(frozen=True)
class CoCoA(Method):
    gamma: float | Literal["search"] | None
    sigma: float | Literal["measured"] | None
    local: LocalSolver
    codec: ErrorFeedback | None
    topology: str
    seed: int = dataclasses.field(compare=False)
    name = "cocoa"
    certificate = "duality gap"
    order = "first"
    sampling = "stochastic"
    space = "dual"

    @classmethod
    def refusal(cls, problem):
        return dual_refusal(problem) or divided_refusal(problem, "sample")

    def check(self, problem):
        super().check(problem)
        if self.codec is not None and problem.rows.mesh is None:
            raise ValueError(
                "cocoa(codec=…): these workers are simulated on one device, and nothing is sent. "
                "Divide the problem over a mesh axis, divide(problem, 'data', mesh=mesh)."
            )

    def init(self, problem, params):
        rows = problem.rows
        point = problem.loss.dual_point(problem.margins(params), problem.y)
        alpha = jnp.where(jnp.any(params.w != 0), point, 0).astype(problem.dtype)
        num, d = max(rows.grid), rows.shape[1]
        state = CoCoAState(
            rows.parts(alpha),
            dual_to_primal(problem, alpha),
            jnp.zeros((), jnp.int32),
            jax.random.key(0),
            () if self.codec is None else jnp.zeros((num, d), jnp.float32),
            jnp.full((), num, problem.dtype) if self.sigma == "measured" else (),
        )
        if not self._searches(problem):
            return state
        kappa = samples_of(problem).kappa
        return state._replace(
            sigma=jnp.full((), min(self.sigma or LEAST_SIGMA, num), problem.dtype),
            v=params.w if kappa is None else params.w + kappa * jnp.sign(params.w),
            value=problem.value(params),
            dual=dual_value(problem, alpha, state.u),
        )

    def seeded(self, state):
        return state._replace(key=jax.random.key(self.seed))

    def _searches(self, problem):
        return self.gamma == "search" and max(problem.rows.grid) > 1

    def step(self, problem, state):
        if self._searches(problem):
            return self._searched(problem, state)
        rows = problem.rows
        num_workers = max(rows.grid)
        gamma: Any = 1 / num_workers if self.gamma is None else self.gamma
        measured = self.sigma == "measured"
        sigma: Any = state.sigma if measured else self.sigma
        if gamma == "search":  # One worker has nothing to search for.
            gamma, sigma = 1.0, 1.0
        sigma = gamma * num_workers if sigma is None else sigma
        d_alpha, d_u = self._ascents(problem, state, state.u, sigma)
        total, residual = self._sum(rows, d_u, state)
        if measured:
            # Gains add up as far as |Σ Δu_k|² <= σ' Σ |Δu_k|²; what is above shortens the step.
            apart = jnp.sum(d_u * d_u)
            together = jnp.where(apart > 0, jnp.sum(total * total) / apart, 1.0)
            gamma = jnp.minimum(1.0, sigma / together).astype(sigma.dtype)
            sigma = jnp.clip(together, 1.0, num_workers).astype(sigma.dtype)
        return CoCoAState(
            state.alpha + gamma * d_alpha,
            state.u + gamma * total,
            state.num_rounds + 1,
            state.key,
            residual,
            sigma if measured else (),
        )

    def _ascents(self, problem, state, u, sigma):
        """What each worker's α and u gain, seen from u: ``[K, n_k]``, ``[K, d]``."""
        rows = problem.rows
        samples = samples_of(problem)
        first = seed_of(state.key, state.num_rounds)
        seeds = first + jnp.arange(max(rows.grid), dtype=jnp.uint32) * jnp.uint32(SPREAD)

        def alone(block, y, scale, q, weight, alpha, seed, u, kappa, sigma):
            own = Samples(block, y, scale, q, kappa)
            return self.local(problem.loss, own, weight, alpha, u, seed, sigma)

        own = [samples.y, samples.scale, samples.q, problem.sample_weight]
        return rows.each(
            alone,
            (*map(rows.parts, own), state.alpha, seeds),
            (u, samples.kappa, sigma),
        )

    def _searched(self, problem, state):
        """A round whose steps are searched, of the dual and of the primal point."""
        penalty, num_workers = problem.penalty, max(problem.rows.grid)
        kappa = samples_of(problem).kappa
        share = state.sigma / num_workers
        seen = share * state.u + (1 - share) * state.v
        d_alpha, d_u = self._ascents(problem, state, seen, state.sigma)
        total = jnp.sum(d_u, axis=0)

        # D is at least a parabola in γ: its linear part is concave, R* bends by l2 at most.
        whole = dual_value(problem, (state.alpha + d_alpha).ravel(), jnp.zeros_like(total))
        rise = whole - state.dual - penalty.conjugate(penalty.l2 * state.u)
        rise = rise - penalty.l2 * jnp.vdot(soft(state.u, kappa), total)
        bend = penalty.l2 * jnp.vdot(total, total)
        gamma = jnp.where(bend > 0, jnp.clip(rise / bend, 0.0, 1.0), 0.0)
        alpha, u = state.alpha + gamma * d_alpha, state.u + gamma * total
        dual = dual_value(problem, alpha.ravel(), u)

        v, value = lowest(problem, state.v, state.u + total)
        slow = value - dual > SLOW * (state.value - state.dual)
        least = min(self.sigma or LEAST_SIGMA, num_workers)
        sigma = jnp.where(slow, 2 * state.sigma, jnp.maximum(state.sigma / 2, least))
        return CoCoAState(
            alpha,
            u,
            state.num_rounds + 1,
            state.key,
            (),
            jnp.minimum(sigma, num_workers),
            v,
            value,
            dual,
        )

    def _sum(self, rows, d_u, state):
        """``Σ_k Δu_k``: the one exchange of a round."""
        if self.codec is None:
            return jnp.sum(d_u, axis=0), ()
        axis, key = rows.axes[0], jax.random.fold_in(state.key, state.num_rounds)

        def exchange(own, residual, key):
            mean, kept = all_reduce_mean(
                own[0], axis, self.codec, self.topology, key=key, residual=residual[0]
            )
            return mean, kept[None]

        spec = P(axis)
        mean, residual = jax.shard_map(
            exchange,
            mesh=rows.mesh,
            in_specs=(spec, spec, P()),
            out_specs=(P(), spec),
            check_vma=False,
        )(d_u, state.residual, key)
        return max(rows.grid) * mean, residual

    def measure(self, problem, state):
        if self._searches(problem):
            return state.value, jnp.maximum(state.value - state.dual, 0)
        return duality_gap(problem, state.alpha.ravel(), self._u(problem, state))

    def _u(self, problem, state):
        # What a codec said is about u; the certificate wants it exact.
        if self.codec is None:
            return state.u
        return dual_to_primal(problem, state.alpha.ravel())

    def params(self, problem, state):
        if self._searches(problem):
            return params_of(problem, state.v)
        return params_of(problem, self._u(problem, state))


def lowest(problem: Any, start: jax.Array, end: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The point of ``start + t (end - start)``, t of ``STEPS``, at which P is least; P there.

    Points stand for ``w = soft(u, κ)``. Travels: a sum for each t.
    """
    kappa = samples_of(problem).kappa
    steps = jnp.asarray(STEPS, problem.dtype)
    points = start[:, None] + steps * (end - start)[:, None]
    weights = soft(points, kappa)
    if kappa is None:
        first, last = problem.rows.matvec(jnp.stack([start, end], axis=1)).T
        margins = first[:, None] + steps * (last - first)[:, None]
    else:
        margins = problem.rows.matvec(weights)
    losses = problem.loss.value(margins, problem.y[:, None])
    values = jnp.mean(problem.sample_weight[:, None] * losses, axis=0)
    values = values + jax.vmap(problem.penalty.value, in_axes=1)(weights)
    best = jnp.argmin(values)
    return points[:, best], values[best]


def cocoa(
    gamma: float | Literal["search"] | None = 1.0,
    sigma: float | Literal["measured"] | None = None,
    local: LocalSolver | None = None,
    codec: ErrorFeedback | None = None,
    topology: str = "two_phase",
    seed: int = 0,
) -> CoCoA:
    """``α_k <- α_k + γ Δα_k`` on each of K workers, ``w <- w + γ Σ_k Δw_k``.

    ``Δα_k`` is about what maximises the dual along the worker's samples, the others held, with the
    quadratic term times σ', which makes good what the others do meanwhile. ``gamma=1`` with
    ``σ' = K`` adds (CoCoA+), ``gamma=None`` is 1/K and averages (CoCoA), in more rounds where there
    are many workers. With one worker it is SDCA.

    ``σ' = K`` allows for workers who all want the same change of w. The proof asks only for
    ``γ |Σ_k Δw_k|² <= σ' Σ_k |Δw_k|²``, and only of the changes that are made. With
    ``sigma="measured"`` this quotient, ``c = |Σ_k Δw_k|² / Σ_k |Δw_k|²`` in [0, K], is taken in
    every round: ``γ = min(1, σ'/c)``, so that the dual rises by at least γ times what the workers'
    subproblems gained, and c, no less than 1, is the σ' of the round that follows (K that of the
    first). Where rows are sparse, or their common direction is found, c is far below K, and rounds
    to a gap depend less on K: ``benchmarks/cocoa.py`` has both.

    **Searched steps.** σ' that allows for others slows what is no common change: where workers
    differ and cancel, ``Δα_k`` should be all of what each wants. With ``gamma="search"`` they do
    not need to allow for each other, for they see a point v that is not bound to the sum u of their
    α: σ' is small and K's not, ``τ = σ'/K``, and each ascends from ``τ u + (1 - τ) v``. After the
    exchange both are moved, each as far as is best, on every worker alike:

        γ = argmax_[0, 1] of a parabola below D(α + γ Δα),   exact for hinges,
        v <- argmin P(v + t (u + Σ_k Δu_k - v)),   t in {0, 2^-5, ..., 2}.

    As τ goes to 0, ``u + Σ Δu_k - v`` goes to ``-∇P(v) / λ``. D never falls, P(v) never rises, and
    v is the answer; a round that leaves more than 0.9 of the gap doubles σ', up to ``σ' = K``,
    which is CoCoA+, and others halve it again. Rounds then hardly depend on K.

    Args:
      gamma: In (0, 1]; None for 1/K; "search", as above, without a codec.
      sigma: σ' > 0; by default γ K, which is safe. Less may be faster, or diverge. "measured", as
        above, wants ``gamma=1`` and no codec. Of a search the least σ', by default 0.25.
      local: What a worker does in a round; ``LocalSDCA()``, one pass, by default.
      codec: ``error_feedback(codec)`` to encode the ``Δw_k``; None sends them exactly.
      topology: See :func:`jdml.communicate.all_reduce_mean`.
      seed: Of the drawing.

    For the losses and penalties of ``sdca``, on rows divided by sample
    (``jdml.models.linear.divide``), over a mesh axis or simulated. Certificate: the duality gap;
    with a codec it is taken at the exact ``w(α)``. State: n numbers over all workers, d on each,
    2 d with a codec or a search.

    Bytes a worker sends per round: an all-reduce of d elements, ``2 (K-1)/K · d`` times their size,
    or as ``all_reduce_mean`` says of a codec; a scalar more with "measured", ten more with a
    search, most of them after the exchange. A certificate adds two scalars, with a codec an
    all-reduce of d; after a search none. A search costs a product of X with two columns, with an
    elastic net eight.

    References: Jaggi et al., "Communication-Efficient Distributed Dual Coordinate Ascent", 2014; Ma
    et al., "Adding vs. Averaging in Distributed Primal-Dual Optimization", 2015, whose bound
    ``σ'_min = γ max_α |Σ_k X_kᵀ α_k|² / Σ_k |X_kᵀ α_k|²`` is what "measured" replaces by the
    quotient of the round (where each worker has d independent rows, the maximum is K); Smith et
    al., "CoCoA: A General Framework for Communication-Efficient Distributed Optimization", JMLR
    2018. The search is of this library; its view is that of sharing ADMM (Boyd et al., 2011, §7.3),
    whose price moves as far as its penalty says.
    """
    if isinstance(gamma, str):
        if gamma != "search":
            raise ValueError(
                f'cocoa(gamma={gamma!r}): expected a number in (0, 1], "search", or None for 1/K.'
            )
        if codec is not None:
            raise ValueError(
                f'cocoa(gamma="search", codec={codec!r}): the search wants the exact sum of what '
                "the workers changed; expected gamma=1 with a codec."
            )
    elif gamma is not None and not 0 < gamma <= 1:
        raise ValueError(
            f'cocoa(gamma={gamma}): expected a number in (0, 1], "search", or None for 1/K.'
        )
    if isinstance(sigma, str):
        if sigma != "measured":
            raise ValueError(f'cocoa(sigma={sigma!r}): expected a number > 0, "measured", or None.')
        if gamma != 1 or codec is not None:
            raise ValueError(
                f'cocoa(gamma={gamma}, sigma="measured", codec={codec!r}): with a measured σ\', γ '
                "follows from each round, after the exchange; expected gamma=1 and no codec."
            )
    elif sigma is not None and not (math.isfinite(sigma) and sigma > 0):
        raise ValueError(f"cocoa(sigma={sigma}): expected a number > 0, or None for γ K.")
    if codec is not None and not isinstance(codec, ErrorFeedback):
        raise ValueError(
            f"cocoa(codec={codec!r}): expected error_feedback(codec) or None. What a codec loses "
            "of w would be lost for good, and the workers' w no longer be that of their α."
        )
    local = LocalSDCA() if local is None else local
    return CoCoA(
        gamma if gamma is None or gamma == "search" else float(gamma),
        sigma if sigma is None or sigma == "measured" else float(sigma),
        local,
        codec,
        topology,
        checked_seed("cocoa", seed),
    )
