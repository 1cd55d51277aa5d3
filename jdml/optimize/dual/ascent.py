"""Coordinate ascent on the dual, sample after sample: the loop that SDCA, cyclic ascent and local
solvers of distributed methods share.

For a sample's dual variable ``β_i`` (feasible for the loss itself; its weight ``s_i`` enters ``w``)

    w = soft(u, κ),   u = (1/λn) Σ_i s_i β_i x_i,   a = x_iᵀ w,   q_i = s_i |x_i|² / λn,
    Δ = dual_step(a, q_i, β_i, y_i),   β_i <- β_i + Δ,   u <- u + s_i Δ x_i / λn.

κ is ``l1 / l2`` of an elastic net, and w is u without an l1.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jdml.optimize.one_kernel import one_kernel

Sampling = Literal["permutation", "replacement", "cyclic"]


class Samples(NamedTuple):
    """What a coordinate step wants to know.

    Attributes:
      rows: X ``[n, d]``.
      y: Labels ``[n]``.
      scale: ``s_i / λn``, ``[n]``: how far u moves along x_i.
      q: ``scale |x_i|²``, ``[n]``, kept above 0.
      kappa: κ, a scalar; None where the penalty has no l1.
    """

    rows: Any
    y: jax.Array
    scale: jax.Array
    q: jax.Array
    kappa: jax.Array | None


class Active(NamedTuple):
    """The samples that are visited; the others were shrunk.

    Attributes:
      order: uint32 ``[n]``; the first ``size`` are their numbers.
      size: uint32.
      threshold: A sample that does not move is left out if it would not though its margin changed
        by as much; inf leaves none out.
    """

    order: jax.Array
    size: jax.Array
    threshold: Any


def samples_of(problem: Any, squared_norms: jax.Array | None = None) -> Samples:
    """Of a problem with an l2 or elastic-net penalty; ``squared_norms`` if they are at hand."""
    penalty = problem.penalty
    if squared_norms is None:
        squared_norms = problem.rows.squared_norms()
    scale = problem.sample_weight / (penalty.l2 * problem.num_samples)
    q = jnp.maximum(scale * squared_norms, jnp.finfo(problem.dtype).tiny)
    kappa = None if penalty.name == "l2" else jnp.asarray(penalty.l1 / penalty.l2, problem.dtype)
    return Samples(problem.rows, problem.y, scale.astype(problem.dtype), q, kappa)


def everyone(n: int, dtype: Any) -> Active:
    """All samples in their order."""
    order = jnp.arange(n, dtype=jnp.uint32)
    return Active(order, jnp.uint32(n), jnp.full((), jnp.inf, dtype))


def soft(u: jax.Array, kappa: jax.Array | None) -> jax.Array:
    """``sign(u) max(|u| - κ, 0)``."""
    return u if kappa is None else jnp.sign(u) * jnp.maximum(jnp.abs(u) - kappa, 0)


def ascend(
    loss: Any,
    sampling: Sampling,
    shrink: bool,
    samples: Samples,
    alpha: jax.Array,
    u: jax.Array,
    active: Active,
    num_steps: jax.Array,
    seed: jax.Array,
) -> tuple[jax.Array, jax.Array, Active]:
    """``num_steps`` coordinate steps, at most ``active.size``, one after the other.

    Args:
      loss: The loss; static, as the two arguments that follow.
      sampling: In an order drawn anew, at random with replacement, or in the order that is there.
      shrink: Whether to leave out samples for the passes that follow (Hsieh et al. 2008, §3.2, by
        the steps instead of the slopes, so that it fits every loss).
      samples: Rows and their constants.
      alpha: β, ``[n]``.
      u: ``[d]``.
      active: Whom to visit.
      num_steps: uint32.
      seed: uint32, of this pass.

    Returns:
      β, u and ``active``, with the largest slope that was met as its next threshold.
    """
    # The kernel is given what it uses and nothing else: see one_kernel.
    parts = (
        samples._replace(rows=samples.rows.in_turn()),
        alpha,
        u,
        active._replace(threshold=active.threshold if shrink else None),
        num_steps,
        None if sampling == "cyclic" else seed,
    )
    leaves, form = jax.tree.flatten(parts)
    alpha, u, largest, *new = _kernel(loss, sampling, shrink, form)(*leaves)
    order, size = new if shrink else (active.order, active.size)
    return alpha, u, Active(order, size, largest)


@functools.lru_cache(maxsize=256)
def _kernel(loss: Any, sampling: Sampling, shrink: bool, form: Any) -> Callable[..., Any]:
    return one_kernel(lambda *leaves: _pass(loss, sampling, shrink, *form.unflatten(leaves)))


def _pass(loss, sampling, shrink, samples, alpha, u, active, num_steps, seed):
    rows, y, scale, q, kappa = samples
    order, count, threshold = active
    num_steps = jnp.minimum(num_steps, count)

    def swap(at, order):
        other = at + lax.rem(_bits(at, seed), count - at)
        here, there = _element(order, at), _element(order, other)
        return lax.cond(
            at != other,
            lambda order: _put(_put(order, other, here), at, there),
            lambda order: order,
            order,
        )

    # First the order and then the steps: so a core can fetch rows before it comes to them.
    if sampling == "permutation":
        order = lax.fori_loop(jnp.uint32(0), num_steps, swap, order)

    def step(at, carry):
        alpha, u, largest, *kept = carry
        drawn = lax.rem(_bits(at, seed), count) if sampling == "replacement" else at
        i = _element(order, drawn)
        y_i, q_i, alpha_i, scale_i = (_element(v, i) for v in (y, q, alpha, scale))
        margin = rows.dot(i, u, lambda u: soft(u, kappa))
        change = loss.dual_step(margin, q_i, alpha_i, y_i)

        def move(alpha, u, largest):
            slope = jnp.abs(loss.dual_slope(alpha_i, y_i) - margin)
            return (
                _put(alpha, i, alpha_i + change),
                rows.add(u, i, scale_i * change),
                jnp.maximum(largest, slope),
                jnp.bool_(False),
            )

        def stay(alpha, u, largest):
            settled = jnp.bool_(False)
            if shrink:
                below = loss.dual_step(margin - threshold, q_i, alpha_i, y_i)
                above = loss.dual_step(margin + threshold, q_i, alpha_i, y_i)
                settled = (below == 0) & (above == 0)
            return alpha, u, largest, settled

        alpha, u, largest, settled = lax.cond(change != 0, move, stay, alpha, u, largest)
        if shrink:
            stays, count_stays = kept
            kept = _put(stays, count_stays, i), jnp.where(settled, count_stays, count_stays + 1)
        return alpha, u, largest, *kept

    kept = (jnp.zeros_like(order), jnp.uint32(0)) if shrink else ()
    first = alpha, u, jnp.zeros((), u.dtype), *kept
    # No array or constant may be returned as it came: XLA aborts on a constant among the results.
    return lax.fori_loop(jnp.uint32(0), num_steps, step, first)


def _bits(at: jax.Array, seed: jax.Array) -> jax.Array:
    """32 random bits of a position and a seed (Wellons' "lowbias32", twice)."""

    def mixed(x):
        x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
        x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
        return x ^ (x >> 16)

    return mixed(mixed(at) + seed)


def _element(v: jax.Array, i: jax.Array) -> jax.Array:
    return lax.dynamic_slice(v, (i,), (1,))[0]


def _put(v: jax.Array, i: jax.Array, value: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice(v, value[None], (i,))
