"""The dual problem's value, the duality gap, and what has such a dual."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdml.optimize.base import Params, Problem
from jdml.optimize.dual.ascent import soft
from jdml.optimize.one_by_one import one_by_one_refusal


def dual_refusal(problem: Problem) -> str | None:
    """Why a problem has no dual that can be ascended here; None if it has."""
    loss, penalty = problem.loss, problem.penalty
    if not loss.has_dual:
        return f"the {loss.name} loss has no dual form here"
    if penalty.name not in ("l2", "elastic_net"):
        return (
            f"the penalty {penalty.name} is not strongly convex, so that α gives no w; "
            "expected l2 or elastic_net"
        )
    if not isinstance(penalty.l2, jax.core.Tracer) and not np.all(np.asarray(penalty.l2) > 0):
        return f"its l2 strength is {float(penalty.l2):g}; expected > 0"
    if problem.intercept:
        return (
            "an intercept that is not penalised ties all dual variables by Σ s_i α_i = 0; append a "
            "column of ones to X, which is penalised, or centre the data"
        )
    return None


def dual_to_primal(problem: Problem, alpha: jax.Array) -> jax.Array:
    """``u = (1/λn) Σ_i s_i α_i x_i``, ``[d]``; with an l2 penalty it is ``w(α)``."""
    pulled = problem.rows.rmatvec(problem.sample_weight * alpha)
    return pulled / (problem.penalty.l2 * problem.num_samples)


def params_of(problem: Problem, u: jax.Array) -> Params:
    """``w = ∇R*(l2 u)``: u, or u shrunk by ``l1 / l2``."""
    penalty = problem.penalty
    return problem.init()._replace(
        w=soft(u, None if penalty.name == "l2" else penalty.l1 / penalty.l2)
    )


def dual_value(problem: Problem, alpha: jax.Array, u: jax.Array) -> jax.Array:
    """``D(α) = -(1/n) Σ_i s_i φ*(-α_i) - R*(l2 u)``; for l2, ``R* = (λ/2) |u|²``."""
    conjugates = problem.loss.conjugate(alpha, problem.y)
    weighted = jnp.where(problem.sample_weight > 0, problem.sample_weight * conjugates, 0)
    return -jnp.mean(weighted) - problem.penalty.conjugate(problem.penalty.l2 * u)


def duality_gap(problem: Problem, alpha: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``(P(w), P(w) - D(α))``, which bounds how far ``P(w)`` is above its minimum.

    It is held at 0 where rounding makes it less.
    """
    value = problem.value(params_of(problem, u))
    return value, jnp.maximum(value - dual_value(problem, alpha, u), 0)


def first_alpha(problem: Problem, params: Params) -> jax.Array:
    """0 for parameters that are 0; otherwise ``-φ'`` at their margins."""
    point = problem.loss.dual_point(problem.margins(params), problem.y)
    return jnp.where(jnp.any(params.w != 0), point, 0).astype(problem.dtype)


def rows_refusal(problem: Problem) -> str | None:
    """``dual_refusal``, and why samples cannot be taken one by one."""
    return dual_refusal(problem) or one_by_one_refusal(problem, "samples")


def seed_of(key: jax.Array, number: jax.Array) -> jax.Array:
    """uint32 of a key and a pass's number."""
    return jax.random.bits(jax.random.fold_in(key, number), (), jnp.uint32)


def checked_seed(name: str, seed: Any) -> int:
    if not (isinstance(seed, (int, np.integer)) and 0 <= seed < 2**32):
        raise ValueError(f"{name}(seed={seed!r}): expected a whole number in [0, 2**32).")
    return int(seed)
