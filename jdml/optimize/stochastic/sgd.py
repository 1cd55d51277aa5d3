"""Stochastic gradient descent: any Optax chain on batches drawn with replacement."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jdml.optimize.base import Method, Params, stationarity
from jdml.optimize.one_by_one import one_by_one_refusal
from jdml.optimize.stochastic.batch import check_batch, checked_size, gradient, take


class SgdState(NamedTuple):
    """Attributes:
    params: w_t.
    average: The averaged parameters.
    chain: The chain's state.
    num_steps: Steps taken; the draw of a step follows from it and the key.
    key: Of all draws.
    """

    params: Params
    average: Params
    chain: Any
    num_steps: jax.Array
    key: jax.Array


@dataclasses.dataclass(frozen=True)
class Sgd(Method):
    chain: optax.GradientTransformation
    batch_size: int
    average: bool
    seed: int = dataclasses.field(compare=False)
    name = "sgd"
    certificate = "gradient norm"
    order = "first"
    sampling = "stochastic"

    @classmethod
    def refusal(cls, problem):
        penalty = problem.penalty
        if not (penalty.smooth or penalty.constraint):
            return f"the penalty {penalty.name} has no gradient everywhere"
        return one_by_one_refusal(problem, "samples")

    def check(self, problem):
        super().check(problem)
        check_batch(self, problem, self.batch_size)

    def check_every(self, problem):
        return -(-problem.num_samples // self.batch_size)

    def init(self, problem, params):
        return SgdState(
            params, params, self.chain.init(params), jnp.zeros((), jnp.int32), jax.random.key(0)
        )

    def seeded(self, state):
        return state._replace(key=jax.random.key(self.seed))

    def step(self, problem, state):
        key = jax.random.fold_in(state.key, state.num_steps)
        samples = jax.random.randint(key, (self.batch_size,), 0, problem.num_samples)
        penalty = problem.penalty
        found = gradient(problem, take(problem, samples), state.params)
        if penalty.smooth:
            found = found._replace(w=found.w + penalty.gradient(state.params.w))
        updates, chain = self.chain.update(found, state.chain, state.params)
        params = optax.apply_updates(state.params, updates)
        if penalty.constraint:
            params = params._replace(w=penalty.project(params.w))
        count = state.num_steps + 1
        share = 2 / (count + 1).astype(problem.dtype)
        average = jax.tree.map(lambda a, p: a + share * (p - a), state.average, params)
        return SgdState(params, average, chain, count, state.key)

    def params(self, problem, state):
        return state.average if self.average else state.params

    def measure(self, problem, state):
        params = self.params(problem, state)
        value, found = problem.loss_and_gradient(params)
        return value + problem.penalty.value(params.w), stationarity(problem, params, found)


def sgd(
    chain: optax.GradientTransformation, batch_size: int = 1, average: bool = False, seed: int = 0
) -> Sgd:
    """``p <- p + chain(∇P_B(p))``, B drawn anew, uniformly with replacement.

    With ``optax.sgd`` of rate ``2 / μ(t + 1)`` on a μ-strongly convex P and with ``average``,
    ``E P - P* <= 2 G² / μ(t + 1)``, ``G²`` a bound on the mean square of its gradients.

    Args:
      chain: Any Optax transformation; a schedule counts steps, not epochs.
      batch_size: Samples of a step.
      average: Whether the answer is ``2/(T(T+1)) Σ_t t w_t`` instead of the last w.
      seed: Of the draws.

    For all losses (at a corner of the hinge, a subgradient), with a smooth penalty or with a
    constraint, onto which each step is projected. Certificate: ``|∇P|`` (the prox-gradient norm
    under a constraint), from a pass over all samples after each epoch. For the hinge it need not
    go to 0 at all: its answer is where the steps end.

    Reference: Robbins & Monro 1951; Lacoste-Julien, Schmidt & Bach, "A Simpler Approach to
    Obtaining an O(1/t) Convergence Rate for the Projected Stochastic Subgradient Method", 2012.
    """
    checked_size("sgd", batch_size=batch_size)
    return Sgd(chain, int(batch_size), bool(average), int(seed))
