"""The Hessian of a linear model's mean loss, as a matrix."""

from typing import Any

import jax
import jax.numpy as jnp


def hessian(problem: Any, margins: jax.Array) -> jax.Array:
    """``(1/n) Σ_i s_i [x_i; 1] φ''_i [x_i; 1]ᵀ`` at these margins, without the penalty.

    Returns:
      ``[p, p]``, in the order of ``jax.flatten_util.ravel_pytree(params)``: w row by row (all
      outputs of a feature together), then b.
    """
    scale = problem.sample_weight / problem.num_samples
    curvature = problem.loss.curvature(margins, problem.y)
    if problem.loss.num_outputs is None:
        weights = scale * curvature
        block = problem.rows.gram(weights)
        edge, corner = problem.rows.rmatvec(weights)[:, None], jnp.sum(weights)[None, None]
    else:
        weights = scale[:, None, None] * curvature
        block, edge = _blocks(problem.rows, weights), _edges(problem.rows, weights)
        corner = jnp.sum(weights, axis=0)
    if not problem.intercept:
        return block
    return jnp.block([[block, edge], [edge.T, corner]])


def _blocks(rows: Any, weights: jax.Array) -> jax.Array:
    """``[d K, d K]`` from ``[n, K, K]``: one Gram matrix for each pair of outputs."""
    d, outputs = rows.shape[1], weights.shape[1]
    above, right = jnp.triu_indices(outputs)
    grams = jax.lax.map(rows.gram, weights[:, above, right].T)
    number = jnp.zeros((outputs, outputs), jnp.int32)
    pairs = jnp.arange(len(above), dtype=jnp.int32)
    number = number.at[above, right].set(pairs).at[right, above].set(pairs)
    # Curvatures are symmetric, and so is a Gram matrix.
    return grams[number].transpose(2, 0, 3, 1).reshape(d * outputs, d * outputs)


def _edges(rows: Any, weights: jax.Array) -> jax.Array:
    """``[d K, K]``: the second derivatives by w and b."""
    n, outputs, _ = weights.shape
    edges = rows.rmatvec(weights.reshape(n, outputs * outputs))
    return edges.reshape(rows.shape[1] * outputs, outputs)
