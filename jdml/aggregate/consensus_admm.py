"""Consensus ADMM: every worker fits its own samples, drawn towards an agreed model by a price."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jdml.aggregate.proximal import Proximal, prox_none
from jdml.communicate import Wire
from jdml.communicate.branch import choose, first_branch
from jdml.communicate.collectives.all_reduce import Axis, Content, check_exchange
from jdml.communicate.exchange import exchange_mean, init_exchange
from jdml.communicate.frequency import check_every

PyTree = Any


class ConsensusADMMState(NamedTuple):
    """State of :func:`consensus_admm`.

    Attributes:
      steps: int32, local steps taken.
      z: The agreed model, the same on every worker.
      dual: Scaled dual variable u, per worker; f32, or f64 beside parameters that are.
      inner: State of the inner optimiser, per worker.
      rho: f32, the penalty as it stands; the same on every worker.
      residual: What the exchange keeps; ``()`` if nothing.
      metrics: f32 scalars of the last round: ``admm_primal`` and ``admm_dual`` residuals, their
        tolerances, ``admm_rho``, and ``admm_converged`` (1 when both are within); and whether the
        last step ended a round.
    """

    steps: jax.Array
    z: PyTree
    dual: PyTree
    inner: Any
    rho: jax.Array
    residual: PyTree
    metrics: dict[str, jax.Array]


def consensus_admm(
    inner: optax.GradientTransformation,
    axis: Axis,
    rho: float = 1.0,
    every: int = 1,
    prox: Proximal | None = None,
    *,
    over_relaxation: float = 1.0,
    adaptive: bool = False,
    restart_inner: bool = False,
    absolute_tolerance: float = 1e-4,
    relative_tolerance: float = 1e-3,
    codec: Content = None,
    topology: str = "two_phase",
) -> optax.GradientTransformationExtraArgs:
    """Minimises ``sum_k f_k(x_k) + g(z)`` with all ``x_k = z``; a chain of its own.

    Each round: ``every`` steps of ``inner`` on ``f_k(x) + rho/2 |x - z + u_k|^2``, from where the
    worker stands; then ``v_k = a x_k + (1 - a) z``, ``z <- prox_{g/(K rho)}(mean_k(v_k + u_k))``,
    ``u_k <- u_k + v_k - z``. ``f_k`` is the worker's own loss, a mean over its samples, so ``g``
    weighs K times less here than it would beside the mean of the ``f_k``.

    The workers' parameters stay their own; the answer is ``z``, in the state
    (``optax.tree.get(state.opt_state, "z")``); they agree to ``admm_primal``.

    Args:
      inner: Optax optimiser for the local problem.
      axis: The worker axis. ``update`` runs inside a ``shard_map`` in which it is manual.
      rho: Penalty > 0. Large: agree soon; small: fit first.
      every: Number >= 1 of inner steps in a round. The local problem is solved as well as they can.
      prox: Proximal operator of g (``prox_l1(...)``, ``prox_l2(...)``, …); ``None``: g = 0.
      over_relaxation: a, in (0, 2); 1.5 to 1.8 often saves rounds.
      adaptive: Doubles rho when the primal residual is over 10 times the dual one, halves it in the
        opposite case, and rescales ``u``; not once both are within their tolerances.
      restart_inner: Whether the inner optimiser starts each round afresh.
      absolute_tolerance: Of both residuals, per element.
      relative_tolerance: Of both residuals, relative to the iterates' norms.
      codec: ``None`` for the exact mean, a codec, or ``error_feedback(codec)``; the distance from
        the agreed model is encoded.
      topology: See :func:`jdml.communicate.all_reduce_mean`; the same bytes, once a round.

    State kept: the parameters, dual and inner state per worker; z, shared. 2 more copies of the
    parameters than the inner optimiser alone, 3 with error feedback.

    Raises:
      ValueError: an argument is out of its range; ``codec`` or ``topology`` is not one.

    Reference: Boyd et al., "Distributed Optimization and Statistical Learning via the Alternating
    Direction Method of Multipliers", 2011, sections 3.3, 3.4 and 7.1.
    """
    _check(rho, every, over_relaxation, absolute_tolerance, relative_tolerance)
    check_exchange("consensus_admm", axis, codec, topology)
    inner = optax.with_extra_args_support(inner)
    shrink = prox_none() if prox is None else prox

    def init(params: PyTree) -> ConsensusADMMState:
        zero = jnp.zeros((), jnp.float32)
        return ConsensusADMMState(
            steps=jnp.zeros((), jnp.int32),
            z=jax.tree.map(jnp.copy, params),  # the parameters' own buffers are donated
            dual=jax.tree.map(lambda p: jnp.zeros_like(p, dtype=_wide(p)), params),
            inner=inner.init(params),
            rho=jnp.asarray(rho, jnp.float32),
            residual=init_exchange(codec, params),
            metrics={
                name: jnp.asarray(rho, jnp.float32) if name == "admm_rho" else zero
                for name in METRICS
            }
            | ({} if every == 1 else first_branch("consensus_admm")),
        )

    def update(
        updates: PyTree,
        state: ConsensusADMMState,
        params: PyTree | None = None,
        *,
        wire: Wire | None = None,
        **extra: Any,
    ) -> tuple[PyTree, ConsensusADMMState]:
        if params is None:
            raise ValueError(
                "consensus_admm needs the parameters: call tx.update(updates, state, params)."
            )
        pulled = jax.tree.map(
            lambda g, x, z, u: (g + state.rho * (x - z + u)).astype(g.dtype),
            updates,
            params,
            state.z,
            state.dual,
        )
        # Made once: read again wherever it is used, z and the dual could not stay where they are.
        pulled = jax.lax.optimization_barrier(pulled)
        moves, inner_state = inner.update(pulled, state.inner, params, wire=wire, **extra)
        steps: jax.Array = optax.safe_increment(state.steps)
        x = optax.apply_updates(params, moves)

        def round_() -> tuple[Any, ...]:
            relaxed = x
            if over_relaxation != 1:
                relaxed = jax.tree.map(
                    lambda x, z: over_relaxation * x + (1 - over_relaxation) * z, x, state.z
                )
            # What is exchanged is small near the end, so that a codec's error is, too. Added in
            # another order than for the dual below, or the sum would be kept for that.
            distance = jax.tree.map(
                lambda v, u, z: (v.astype(u.dtype) - z) + u, relaxed, state.dual, state.z
            )
            mean, residual = exchange_mean(distance, state.residual, axis, codec, topology, wire)
            num_workers = jax.lax.axis_size(axis)
            z = shrink(
                jax.tree.map(lambda z, d: (z + d).astype(z.dtype), state.z, mean),
                1 / (num_workers * state.rho),
            )
            dual = jax.tree.map(lambda u, v, z: u + v - z, state.dual, relaxed, z)
            metrics = _residuals(
                x, z, state.z, dual, state.rho, axis, absolute_tolerance, relative_tolerance
            )
            new_rho = state.rho
            if adaptive:
                primal, gap = metrics["admm_primal"], metrics["admm_dual"]
                factor = jnp.where(primal > 10 * gap, 2.0, jnp.where(gap > 10 * primal, 0.5, 1.0))
                # At the end residuals are rounding errors, or 0: their ratio would drive rho off.
                factor = jnp.where(metrics["admm_converged"] > 0, 1.0, factor)
                new_rho = state.rho * factor
                dual = jax.tree.map(lambda u: u / factor, dual)
            metrics["admm_rho"] = new_rho
            fresh = inner.init(x) if restart_inner else inner_state
            return z, dual, fresh, new_rho, residual, metrics

        def alone() -> tuple[Any, ...]:
            metrics = {name: state.metrics[name] for name in METRICS}
            return state.z, state.dual, inner_state, state.rho, state.residual, metrics

        if every == 1:
            return moves, ConsensusADMMState(steps, *round_())
        result, due = choose("consensus_admm", steps % every == 0, (alone, round_))
        z, dual, inner_state, penalty, residual, metrics = result
        return moves, ConsensusADMMState(
            steps, z, dual, inner_state, penalty, residual, metrics | due
        )

    return optax.GradientTransformationExtraArgs(init, update)


METRICS = (
    "admm_primal",
    "admm_primal_tolerance",
    "admm_dual",
    "admm_dual_tolerance",
    "admm_rho",
    "admm_converged",
)


def _residuals(
    x: PyTree,
    z: PyTree,
    z_old: PyTree,
    dual: PyTree,
    rho: jax.Array,
    axis: Axis,
    absolute: float,
    relative: float,
) -> dict[str, jax.Array]:
    """Norms over all workers at once, and what section 3.3.1 of the reference tolerates."""
    num_workers = jax.lax.axis_size(axis)

    def squares(tree: PyTree) -> jax.Array:
        return sum(
            (jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)),
            start=jnp.zeros((), jnp.float32),
        )

    apart = jax.tree.map(lambda x, z: x.astype(_wide(x)) - z, x, z)
    # One all-reduce of three numbers.
    totals = jax.lax.psum(jnp.stack([squares(apart), squares(x), squares(dual)]), axis)
    primal, norm_x, norm_u = jnp.sqrt(totals)
    moved = jax.tree.map(lambda a, b: a.astype(_wide(a)) - b, z, z_old)
    root_k = math.sqrt(num_workers)
    dual_residual = rho * root_k * jnp.sqrt(squares(moved))
    size = sum(leaf.size for leaf in jax.tree.leaves(z))
    floor = math.sqrt(num_workers * size) * absolute
    primal_tolerance = floor + relative * jnp.maximum(norm_x, root_k * jnp.sqrt(squares(z)))
    dual_tolerance = floor + relative * rho * norm_u
    converged = (primal <= primal_tolerance) & (dual_residual <= dual_tolerance)
    return {
        "admm_primal": primal,
        "admm_primal_tolerance": primal_tolerance,
        "admm_dual": dual_residual,
        "admm_dual_tolerance": dual_tolerance,
        "admm_converged": converged.astype(jnp.float32),
    }


def _wide(x: jax.Array) -> Any:
    """f32, or the dtype itself where that is wider."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _check(
    rho: float, every: int, over_relaxation: float, absolute: float, relative: float
) -> None:
    if not (math.isfinite(rho) and rho > 0):
        raise ValueError(f"consensus_admm(rho={rho!r}): expected a finite penalty > 0.")
    check_every("consensus_admm", every, schedules=False)
    if not 0 < over_relaxation < 2:
        raise ValueError(
            f"consensus_admm(over_relaxation={over_relaxation!r}): expected 0 < a < 2; 1 is plain "
            "ADMM, 1.5 to 1.8 is usual."
        )
    if not (absolute >= 0 and relative >= 0):
        raise ValueError(
            f"consensus_admm: tolerances {absolute} and {relative} must not be negative."
        )
