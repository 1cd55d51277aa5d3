"""SVRG: stochastic gradients corrected by those at a snapshot."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdml.optimize.base import Method, Params, bounded_refusal, stationarity
from jdml.optimize.first_order.gradient_descent import checked_step
from jdml.optimize.first_order.majorise import Point, point
from jdml.optimize.one_by_one import one_by_one_refusal
from jdml.optimize.stochastic.batch import (
    check_batch,
    checked_size,
    margins,
    mean_pull,
    step_or,
    take,
)

PASSES = 2
"""Samples drawn between snapshots, in units of n."""


class SvrgState(NamedTuple):
    """Attributes:
    snapshot: Parameters and margins.
    value: The objective there.
    gradient: That of the mean loss there.
    step_size: η.
    num_steps: Snapshots taken; the draws after one follow from it and the key.
    key: Of all draws.
    """

    snapshot: Point
    value: jax.Array
    gradient: Params
    step_size: jax.Array
    num_steps: jax.Array
    key: jax.Array

    @property
    def params(self) -> Params:
        return self.snapshot.params


@dataclasses.dataclass(frozen=True)
class Svrg(Method):
    step_size: float | None
    batch_size: int
    seed: int = dataclasses.field(compare=False)
    name = "svrg"
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
        step_size = step_or(problem, self.step_size, 0.25, self.batch_size)
        return self._at(problem, params, step_size, jnp.zeros((), jnp.int32), jax.random.key(0))

    def _at(self, problem, params, step_size, count, key) -> SvrgState:
        at = point(problem, params)
        found = problem.pull(problem.slopes(at.margins))
        value = problem.loss_at(at.margins) + problem.penalty.value(params.w)
        return SvrgState(at, value, found, step_size, count, key)

    def seeded(self, state):
        return state._replace(key=jax.random.key(self.seed))

    def step(self, problem, state):
        n, size = problem.num_samples, self.batch_size
        draws = PASSES * n // size
        key = jax.random.fold_in(state.key, state.num_steps)
        samples = jax.random.randint(key, (draws, size), 0, n)
        known = problem.loss.derivative(state.snapshot.margins, problem.y)

        def move(params, chosen):
            batch = take(problem, chosen)
            here = problem.loss.derivative(margins(batch, params), batch.y)
            change = mean_pull(batch, here - known[chosen], params)
            moved = jax.tree.map(
                lambda p, c, g: p - state.step_size * (c + g), params, change, state.gradient
            )
            return problem.prox(moved, state.step_size), None

        params, _ = jax.lax.scan(move, state.params, samples)
        return self._at(problem, params, state.step_size, state.num_steps + 1, state.key)

    def measure(self, problem, state):
        return state.value, stationarity(problem, state.params, state.gradient)


def svrg(step_size: float | None = None, batch_size: int = 1, seed: int = 0) -> Svrg:
    """``p <- prox_{ηR}(p - η(∇f_B(p) - ∇f_B(p̃) + ∇f(p̃)))``, p̃ a snapshot after every 2n samples.

    A step is all between two snapshots: 2n samples drawn with replacement, and a pass for ∇f(p̃).
    A draw costs d operations with sparse rows, too, for the mean gradient is dense; larger batches
    make fewer of them.
    On a μ-strongly convex objective with ``η < 1/4L`` and m draws of one sample, ``P - P*`` shrinks
    in expectation by ``1/(μη(1-4Lη)m) + 4Lη(m+1)/((1-4Lη)m)`` a step. The new snapshot is the last
    p.

    Args:
      step_size: η > 0; by default ``1/4L(b)``, see ``batch_curvature``.
      batch_size: Samples of a draw, b.
      seed: Of the draws.

    For differentiable losses of bounded curvature with any penalty or constraint. Certificate:
    ``|∇P|``, or with a penalty that has no gradient ``|p - prox_R(p - ∇f(p))|``, at snapshots.

    References: Johnson & Zhang, "Accelerating Stochastic Gradient Descent using Predictive Variance
    Reduction", 2013; Xiao & Zhang 2014 (the proximal step).
    """
    checked_size("svrg", batch_size=batch_size)
    return Svrg(checked_step("svrg", step_size), int(batch_size), int(seed))
