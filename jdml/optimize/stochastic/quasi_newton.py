"""Stochastic quasi-Newton: SGD preconditioned by L-BFGS pairs from Hessian products."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jdml.optimize.base import Method, Params, smooth_refusal, stationarity
from jdml.optimize.one_by_one import one_by_one_refusal
from jdml.optimize.stochastic.batch import (
    batch_curvature,
    check_batch,
    checked_size,
    gradient,
    margins,
    mean_pull,
    take,
)


class QuasiNewtonState(NamedTuple):
    """Attributes:
    params: w.
    mean: The mean of w over the last cycle, flat.
    moves: ``s`` of the pairs, ``[memory, p]``, oldest first.
    bends: ``y`` of the pairs, ``[memory, p]``.
    pairs: How many there are.
    cycle: Cycles done; draws follow from it and the key.
    first: The step before there are pairs, 1/L.
    key: Of all draws.
    """

    params: Params
    mean: jax.Array
    moves: jax.Array
    bends: jax.Array
    pairs: jax.Array
    cycle: jax.Array
    first: jax.Array
    key: jax.Array


@dataclasses.dataclass(frozen=True)
class QuasiNewton(Method):
    batch_size: int
    hessian_batch: int
    cycle: int
    memory: int
    scale: float
    offset: float
    seed: int = dataclasses.field(compare=False)
    name = "quasi_newton"
    certificate = "gradient norm"
    order = "second"
    sampling = "stochastic"

    @classmethod
    def refusal(cls, problem):
        if problem.loss.smoothness is None and problem.loss.differentiable:
            return f"the curvature of the {problem.loss.name} loss has no bound to start from"
        return smooth_refusal(problem) or one_by_one_refusal(problem, "samples")

    def check(self, problem):
        super().check(problem)
        check_batch(self, problem, max(self.batch_size, self.hessian_batch))

    def check_every(self, problem):
        return -(-problem.num_samples // (self.batch_size * self.cycle))

    def init(self, problem, params):
        flat, _ = ravel_pytree(params)
        empty = jnp.zeros((self.memory, flat.size), flat.dtype)
        zero = jnp.zeros((), jnp.int32)
        curvature = batch_curvature(problem, self.batch_size) + problem.penalty.strong_convexity
        return QuasiNewtonState(
            params, flat, empty, empty, zero, zero, 1 / curvature, jax.random.key(0)
        )

    def seeded(self, state):
        return state._replace(key=jax.random.key(self.seed))

    def step(self, problem, state):
        n = problem.num_samples
        flat, unravel = ravel_pytree(state.params)
        key = jax.random.fold_in(state.key, state.cycle)
        for_gradients, for_hessian = jax.random.split(key)
        samples = jax.random.randint(for_gradients, (self.cycle, self.batch_size), 0, n)
        before = state.cycle.astype(flat.dtype) * self.cycle
        sizes = self.scale / (1 + (before + jnp.arange(self.cycle)) / self.offset)

        def move(carry, draw):
            flat, total = carry
            chosen, size = draw
            params = unravel(flat)
            found = gradient(problem, take(problem, chosen), params)
            found = found._replace(w=found.w + problem.penalty.gradient(params.w))
            flat = flat - size * _precondition(state, ravel_pytree(found)[0])
            return (flat, total + flat), None

        (flat, total), _ = jax.lax.scan(
            move, (flat, jnp.zeros_like(flat)), (samples, sizes.astype(flat.dtype))
        )
        mean = total / self.cycle
        chosen = jax.random.randint(for_hessian, (self.hessian_batch,), 0, n)
        moved = mean - state.mean
        bent, _ = ravel_pytree(self._product(problem, chosen, unravel(mean), unravel(moved)))
        # The first mean has none before it; a pair without curvature would break H.
        enough = jnp.finfo(flat.dtype).eps * jnp.vdot(bent, bent)
        useful = (state.cycle > 0) & (jnp.vdot(moved, bent) > enough)

        def pushed(memory, new):
            return jnp.where(useful, jnp.concatenate([memory[1:], new[None]]), memory)

        return QuasiNewtonState(
            unravel(flat),
            mean,
            pushed(state.moves, moved),
            pushed(state.bends, bent),
            jnp.minimum(state.pairs + useful, self.memory),
            state.cycle + 1,
            state.first,
            state.key,
        )

    def _product(self, problem, chosen, params, change) -> Params:
        batch = take(problem, chosen)
        bend = problem.loss.curvature_product(
            margins(batch, params), batch.y, margins(batch, change)
        )
        found = mean_pull(batch, bend, params)
        return found._replace(w=found.w + problem.penalty.strong_convexity * change.w)

    def measure(self, problem, state):
        value, found = problem.loss_and_gradient(state.params)
        value = value + problem.penalty.value(state.params.w)
        return value, stationarity(problem, state.params, found)


def _precondition(state: QuasiNewtonState, gradient: jax.Array) -> jax.Array:
    """H times a gradient, by the two loops over the pairs; 1/L times it before there are any."""
    memory = len(state.moves)
    there = jnp.arange(memory) >= memory - state.pairs
    inner = jnp.sum(state.moves * state.bends, axis=1)
    rho = jnp.where(there, 1 / jnp.where(there, inner, 1.0), 0.0)

    def back(v, pair):
        move, bend, rho = pair
        alpha = rho * jnp.vdot(move, v)
        return v - alpha * bend, alpha

    def forth(v, pair):
        move, bend, rho, alpha = pair
        return v + (alpha - rho * jnp.vdot(bend, v)) * move, None

    pairs = (state.moves, state.bends, rho)
    v, alphas = jax.lax.scan(back, gradient, pairs, reverse=True)
    last = jnp.vdot(state.bends[-1], state.bends[-1])
    scale = jnp.where(state.pairs > 0, inner[-1] / jnp.where(last > 0, last, 1.0), state.first)
    v, _ = jax.lax.scan(forth, scale * v, (*pairs, alphas))
    return v


def quasi_newton(
    batch_size: int = 32,
    hessian_batch: int = 256,
    cycle: int = 10,
    memory: int = 10,
    scale: float = 0.1,
    offset: float = 100.0,
    seed: int = 0,
) -> QuasiNewton:
    """``p <- p - α_k H ∇P_B(p)``, H from pairs ``s = p̄ - p̄_before``, ``y = ∇²P_C(p̄) s``.

    A step is a cycle: that many updates, then a pair from the means p̄ of two cycles and a Hessian
    product over samples C of their own, so that H does not follow the noise of gradients. With
    ``α_k = scale / (1 + k/offset)`` the rate is sublinear, ``E P - P* = O(1/k)`` under strong
    convexity if ``scale · offset`` is large enough.

    Args:
      batch_size: Samples of an update, drawn with replacement.
      hessian_batch: Samples of a Hessian product.
      cycle: Updates of a step.
      memory: Pairs kept.
      scale: The first ``α``.
      offset: Updates after which α is halved.
      seed: Of the draws.

    For differentiable losses of bounded curvature and smooth penalties. Certificate: ``|∇P|``, from
    a pass over all samples after about an epoch.

    Reference: Byrd, Hansen, Nocedal & Singer, "A Stochastic Quasi-Newton Method for Large-Scale
    Optimization", 2016. Before there are pairs, steps go along the gradient over its bound L.
    """
    checked_size(
        "quasi_newton",
        batch_size=batch_size,
        hessian_batch=hessian_batch,
        cycle=cycle,
        memory=memory,
    )
    if not (scale > 0 and offset > 0):
        raise ValueError(f"quasi_newton(scale={scale}, offset={offset}): expected both > 0.")
    return QuasiNewton(
        int(batch_size),
        int(hessian_batch),
        int(cycle),
        int(memory),
        float(scale),
        float(offset),
        int(seed),
    )
