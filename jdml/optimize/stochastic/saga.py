"""SAGA: stochastic gradients corrected by the last one of each sample."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdml.optimize.base import Method, Params, bounded_refusal, stationarity
from jdml.optimize.first_order.gradient_descent import checked_step
from jdml.optimize.one_by_one import one_by_one_refusal
from jdml.optimize.stochastic.batch import (
    check_batch,
    checked_size,
    margins,
    mean_pull,
    step_or,
    take,
    times,
)


class SagaState(NamedTuple):
    """Attributes:
    params: The parameters.
    slopes: ``φ'`` of each sample when it was drawn last, in the margins' shape.
    step_size: η.
    num_steps: Epochs; the draws of one follow from it and the key.
    key: Of all draws.
    """

    params: Params
    slopes: jax.Array
    step_size: jax.Array
    num_steps: jax.Array
    key: jax.Array


@dataclasses.dataclass(frozen=True)
class Saga(Method):
    step_size: float | None
    batch_size: int
    seed: int = dataclasses.field(compare=False)
    name = "saga"
    certificate = "gradient norm"
    order = "first"
    sampling = "stochastic"

    @classmethod
    def refusal(cls, problem):
        return bounded_refusal(problem) or one_by_one_refusal(problem, "samples")

    def check(self, problem):
        super().check(problem)
        check_batch(self, problem, self.batch_size)

    def init(self, problem, params):
        at = problem.margins(params)
        return SagaState(
            params,
            problem.loss.derivative(at, problem.y),
            step_or(problem, self.step_size, 1 / 3, self.batch_size),
            jnp.zeros((), jnp.int32),
            jax.random.key(0),
        )

    def seeded(self, state):
        return state._replace(key=jax.random.key(self.seed))

    def step(self, problem, state):
        n, size = problem.num_samples, self.batch_size
        key = jax.random.fold_in(state.key, state.num_steps)
        to_batches, to_draws = jax.random.split(key)
        # Batches of samples that differ, for each has one entry in the table.
        batches = jax.random.permutation(to_batches, n)[: n // size * size].reshape(-1, size)
        draws = jax.random.randint(to_draws, (len(batches),), 0, len(batches))

        def move(carry, draw):
            params, slopes, mean = carry
            chosen = batches[draw]
            batch = take(problem, chosen)
            here = problem.loss.derivative(margins(batch, params), batch.y)
            # Read before the table is written to, or XLA copies it at every draw.
            before, slopes = jax.lax.optimization_barrier((slopes[chosen], slopes))
            change = mean_pull(batch, here - before, params)
            moved = jax.tree.map(
                lambda p, c, m: p - state.step_size * (c + m), params, change, mean
            )
            mean = jax.tree.map(lambda m, c: m + size / n * c, mean, change)
            slopes = slopes.at[chosen].set(here)
            return (problem.prox(moved, state.step_size), slopes, mean), None

        # The mean anew from the table, for its updates gather rounding.
        scale = problem.sample_weight / n
        start = (state.params, state.slopes, problem.pull(times(scale, state.slopes)))
        (params, slopes, _), _ = jax.lax.scan(move, start, draws)
        return SagaState(params, slopes, state.step_size, state.num_steps + 1, state.key)

    def measure(self, problem, state):
        value, found = problem.loss_and_gradient(state.params)
        value = value + problem.penalty.value(state.params.w)
        return value, stationarity(problem, state.params, found)


def saga(step_size: float | None = None, batch_size: int = 1, seed: int = 0) -> Saga:
    """``p <- prox_{ηR}(p - η(∇f_B(p) - φ_B + mean φ))``, ``φ_i`` that of i when it was last drawn.

    A step is an epoch, n/b draws with replacement (a batch of b > 1 is drawn from a division of the
    samples made for the epoch). For a linear model ``φ_i`` is one number a sample (a row of K for K
    outputs); the mean is dense, so that a draw costs d operations with sparse rows, too. With b = 1
    and ``η = 1/3L_max``, ``E |p - p*|²`` shrinks by ``1 - min(1/4n, μ/3L_max)`` a draw.

    Args:
      step_size: η > 0; by default ``1/3L(b)``, see ``batch_curvature``.
      batch_size: Samples of a draw, b.
      seed: Of the draws.

    For differentiable losses of bounded curvature with any penalty or constraint. Certificate:
    ``|∇P|``, or with a penalty that has no gradient ``|p - prox_R(p - ∇f(p))|``, from a pass over
    all samples after each epoch.

    Reference: Defazio, Bach & Lacoste-Julien, "SAGA: A Fast Incremental Gradient Method With
    Support for Non-Strongly Convex Composite Objectives", 2014.
    """
    checked_size("saga", batch_size=batch_size)
    return Saga(checked_step("saga", step_size), int(batch_size), int(seed))
