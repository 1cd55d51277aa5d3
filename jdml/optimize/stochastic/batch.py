"""What stochastic methods share: some of the samples, their gradient, bounds on curvature."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdml.optimize.base import Method, Params, Problem, norm


class Batch(NamedTuple):
    """Samples taken: rows, labels, weights ``[b]``."""

    rows: Any
    y: jax.Array
    weight: jax.Array


def take(problem: Problem, samples: jax.Array) -> Batch:
    """The samples of these numbers, ``[b]``."""
    return Batch(problem.rows.take(samples), problem.y[samples], problem.sample_weight[samples])


def margins(batch: Batch, params: Params) -> jax.Array:
    found = batch.rows.matvec(params.w)
    return found if params.b is None else found + params.b


def mean_pull(batch: Batch, v: jax.Array, like: Params) -> Params:
    """``(1/b) Σ s_i v_i [x_i; 1]``, as parameters are kept."""
    v = times(batch.weight / batch.weight.size, v)
    b = None if like.b is None else jnp.sum(v, axis=0)
    return like._replace(w=batch.rows.rmatvec(v), b=b)


def gradient(problem: Problem, batch: Batch, params: Params) -> Params:
    """Of the batch's mean loss, without the penalty."""
    return mean_pull(batch, problem.loss.derivative(margins(batch, params), batch.y), params)


def times(weight: jax.Array, v: jax.Array) -> jax.Array:
    """A weight for each sample times ``[b]`` or ``[b, outputs]``."""
    return weight.reshape(weight.shape + (1,) * (v.ndim - 1)) * v


def largest_curvatures(problem: Problem) -> tuple[jax.Array, jax.Array]:
    """``(L, L_max)``: bounds on the curvature of the mean loss, and of any one sample's.

    L is the lesser of the mean over samples and 1.2 times what the power method finds in six steps.
    """
    extra = 1.0 if problem.intercept else 0.0
    each = problem.loss.smoothness * problem.sample_weight * (problem.rows.squared_norms() + extra)
    scale = problem.loss.smoothness * problem.sample_weight / problem.num_samples

    def once(_, carry):
        v, _ = carry
        moved = problem.margins(jax.tree.map(lambda x: x / norm(v), v))
        product = problem.pull(times(scale, moved))
        return product, norm(product)

    start = jax.tree.map(jnp.ones_like, problem.init())
    _, power = jax.lax.fori_loop(0, 6, once, (start, norm(start)))
    return jnp.minimum(jnp.mean(each), 1.2 * power), jnp.max(each)


def batch_curvature(problem: Problem, size: int) -> jax.Array:
    """``L(b) = n(b-1)/(b(n-1)) L + (n-b)/(b(n-1)) L_max``: L_max for one sample, L for all.

    Reference: Gazagnadou et al., "Optimal Mini-Batch and Step Sizes for SAGA", ICML 2019.
    """
    mean, largest = largest_curvatures(problem)
    n = max(problem.num_samples, 2)
    found = n * (size - 1) / (size * (n - 1)) * mean + (n - size) / (size * (n - 1)) * largest
    return jnp.where(found > 0, found, 1.0).astype(problem.dtype)


def step_or(problem: Problem, step_size: float | None, share: float, size: int) -> jax.Array:
    """The step given, or ``share / L(b)``."""
    if step_size is not None:
        return jnp.asarray(step_size, problem.dtype)
    return share / batch_curvature(problem, size)


def check_batch(method: Method, problem: Problem, size: int) -> None:
    if size > problem.num_samples:
        raise ValueError(
            f"{method.name}(batch_size={size}): the problem has {problem.num_samples} samples; "
            "expected at most as many."
        )


def checked_size(name: str, **sizes: int) -> None:
    for argument, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}({argument}={size}): expected at least 1.")
