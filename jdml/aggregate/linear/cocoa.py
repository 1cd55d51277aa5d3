"""CoCoA and CoCoA+: every worker ascends the dual on its own samples, and says what w gained."""

import dataclasses
import math
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jdml.aggregate.linear.divided import divided_refusal
from jdml.communicate import ErrorFeedback, all_reduce_mean
from jdml.optimize.base import Method
from jdml.optimize.dual.ascent import Samples, samples_of
from jdml.optimize.dual.gap import (
    checked_seed,
    dual_refusal,
    dual_to_primal,
    duality_gap,
    params_of,
    seed_of,
)
from jdml.optimize.dual.sdca import local_sdca
from jdml.optimize.dual.sdna import maximise_block

SPREAD = 0x85EBCA6B
"""Odd, so that seeds of workers differ; worker 0 has the round's own."""


class LocalSolver(Protocol):
    """A frozen object that ascends a worker's subproblem.

    ``(loss, samples, weight [n_k], alpha [n_k], u [d], seed, sigma) -> (Δα, Δu)``, as
    ``local_sdca``: it maximises, about, the dual along ``α_k`` alone with ``σ'`` times the
    curvature, and ``Δu = Σ_i scale_i Δα_i x_i`` is without σ'.
    """

    def __call__(
        self,
        loss: Any,
        samples: Samples,
        weight: jax.Array,
        alpha: jax.Array,
        u: jax.Array,
        seed: jax.Array,
        sigma: jax.Array | float,
    ) -> tuple[jax.Array, jax.Array]: ...


@dataclasses.dataclass(frozen=True)
class LocalSDCA:
    """``passes`` permutations of the worker's samples by SDCA."""

    passes: int = 1

    def __post_init__(self) -> None:
        _check_passes("LocalSDCA", self.passes)

    def __call__(self, loss, samples, weight, alpha, u, seed, sigma):
        return local_sdca(loss, samples, alpha, u, self.passes * len(alpha), seed, sigma)


@dataclasses.dataclass(frozen=True)
class LocalSDNA:
    """``passes`` over the worker's samples, ``block`` neighbours at a time, by SDNA's step.

    A worker with fewer samples than ``block`` takes all at once: its subproblem's maximum.
    """

    block: int = 32
    passes: int = 1

    def __post_init__(self) -> None:
        _check_passes("LocalSDNA", self.passes)
        if self.block < 1:
            raise ValueError(f"LocalSDNA(block={self.block}): expected at least 1.")

    def __call__(self, loss, samples, weight, alpha, u, seed, sigma):
        stretched = samples._replace(scale=sigma * samples.scale, q=sigma * samples.q)
        n, size = len(alpha), min(self.block, len(alpha))
        order = jnp.resize(jnp.arange(n), (-(-n // size), size))

        def one(carry, chosen):
            alpha, ahead = carry
            rows = samples.rows.take(chosen)
            part = stretched._replace(
                rows=rows,
                y=samples.y[chosen],
                scale=stretched.scale[chosen],
                q=stretched.q[chosen],
            )
            new = maximise_block(loss, part, weight[chosen], alpha[chosen], ahead)
            ahead = ahead + rows.rmatvec(part.scale * (new - alpha[chosen]))
            return (alpha.at[chosen].set(new), ahead), None

        order = jnp.tile(order, (self.passes, 1))
        (new, ahead), _ = jax.lax.scan(one, (alpha, u), order)
        return new - alpha, (ahead - u) / sigma


class CoCoAState(NamedTuple):
    """What CoCoA resumes from.

    Attributes:
      alpha: ``[K, n_k]``, each worker's own.
      u: ``[d]``, ``(1/λn) Σ s_i α_i x_i`` as the workers know it, the same on all.
      num_rounds: int32.
      key: Of all draws.
      residual: ``[K, d]`` f32, what a codec has not said yet; ``()`` without one.
      sigma: σ' of the next round where it is measured, else ``()``.
    """

    alpha: jax.Array
    u: jax.Array
    num_rounds: jax.Array
    key: jax.Array
    residual: Any
    sigma: Any


@dataclasses.dataclass(frozen=True)
class CoCoA(Method):
    gamma: float | None
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
        residual = () if self.codec is None else jnp.zeros((num, d), jnp.float32)
        return CoCoAState(
            rows.parts(alpha),
            dual_to_primal(problem, alpha),
            jnp.zeros((), jnp.int32),
            jax.random.key(0),
            residual,
            jnp.full((), num, problem.dtype) if self.sigma == "measured" else (),
        )

    def seeded(self, state):
        return state._replace(key=jax.random.key(self.seed))

    def step(self, problem, state):
        rows, loss = problem.rows, problem.loss
        num_workers = max(rows.grid)
        gamma = 1 / num_workers if self.gamma is None else self.gamma
        measured = self.sigma == "measured"
        sigma: Any = state.sigma if measured else self.sigma or gamma * num_workers
        samples = samples_of(problem)
        first = seed_of(state.key, state.num_rounds)
        seeds = first + jnp.arange(num_workers, dtype=jnp.uint32) * jnp.uint32(SPREAD)

        def alone(block, y, scale, q, weight, alpha, seed, u, kappa, sigma):
            own = Samples(block, y, scale, q, kappa)
            return self.local(loss, own, weight, alpha, u, seed, sigma)

        own = [samples.y, samples.scale, samples.q, problem.sample_weight]
        d_alpha, d_u = rows.each(
            alone,
            (*map(rows.parts, own), state.alpha, seeds),
            (state.u, samples.kappa, sigma),
        )
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
        return duality_gap(problem, state.alpha.ravel(), self._u(problem, state))

    def _u(self, problem, state):
        # What a codec said is about u; the certificate wants it exact.
        if self.codec is None:
            return state.u
        return dual_to_primal(problem, state.alpha.ravel())

    def params(self, problem, state):
        return params_of(problem, self._u(problem, state))


def cocoa(
    gamma: float | None = 1.0,
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

    Args:
      gamma: In (0, 1]; None for 1/K.
      sigma: σ' > 0; by default γ K, which is safe. Less may be faster, or diverge. "measured", as
        above, wants ``gamma=1`` and no codec.
      local: What a worker does in a round; ``LocalSDCA()``, one pass, by default.
      codec: ``error_feedback(codec)`` to encode the ``Δw_k``; None sends them exactly.
      topology: See :func:`jdml.communicate.all_reduce_mean`.
      seed: Of the drawing.

    For the losses and penalties of ``sdca``, on rows divided by sample
    (``jdml.models.linear.divide``), over a mesh axis or simulated. Certificate: the duality gap;
    with a codec it is taken at the exact ``w(α)``. State: n numbers over all workers, d on each,
    2 d with a codec.

    Bytes a worker sends per round: an all-reduce of d elements, ``2 (K-1)/K · d`` times their size,
    or as ``all_reduce_mean`` says of a codec; a scalar more with "measured". A certificate adds two
    scalars, with a codec an all-reduce of d.

    References: Jaggi et al., "Communication-Efficient Distributed Dual Coordinate Ascent", 2014; Ma
    et al., "Adding vs. Averaging in Distributed Primal-Dual Optimization", 2015, whose bound
    ``σ'_min = γ max_α |Σ_k X_kᵀ α_k|² / Σ_k |X_kᵀ α_k|²`` is what "measured" replaces by the
    quotient of the round (where each worker has d independent rows, the maximum is K); Smith et
    al., "CoCoA: A General Framework for Communication-Efficient Distributed Optimization", JMLR
    2018.
    """
    if gamma is not None and not 0 < gamma <= 1:
        raise ValueError(f"cocoa(gamma={gamma}): expected a number in (0, 1], or None for 1/K.")
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
        None if gamma is None else float(gamma),
        sigma if sigma is None or sigma == "measured" else float(sigma),
        local,
        codec,
        topology,
        checked_seed("cocoa", seed),
    )


def _check_passes(name: str, passes: int) -> None:
    if not (isinstance(passes, (int, np.integer)) and passes >= 1):
        raise ValueError(f"{name}(passes={passes!r}): expected a whole number >= 1.")
