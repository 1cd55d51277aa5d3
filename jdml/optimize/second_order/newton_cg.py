"""Newton's method with the system solved by conjugate gradients."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdml.optimize.base import Method, Params, add, dot, norm, smooth_refusal
from jdml.optimize.first_order.majorise import point
from jdml.optimize.second_order.descent import at, backtrack


class _CG(NamedTuple):
    """x solves up to the residual r; p is the next way to go."""

    x: Params
    r: Params
    p: Params
    squared: jax.Array
    num_products: jax.Array
    flat: jax.Array


@dataclasses.dataclass(frozen=True)
class NewtonCG(Method):
    max_products: int
    name = "newton_cg"
    certificate = "gradient norm"
    order = "second"
    sampling = "deterministic"

    @classmethod
    def refusal(cls, problem):
        return smooth_refusal(problem)

    def init(self, problem, params):
        return at(problem, point(problem, params))

    def step(self, problem, state):
        direction = self._direction(problem, state)
        return backtrack(problem, state, direction, dot(state.gradient, direction))

    def _direction(self, problem, state) -> Params:
        """About ``-H⁻¹ g``, to a residual of ``min(1/2, √|g|) |g|`` in units of the first |g|."""
        size = norm(state.gradient)
        enough = jnp.minimum(0.5, jnp.sqrt(size)) * size

        def product(v: Params) -> Params:
            found = problem.curvature_product(state.point.margins, v)
            return found._replace(w=found.w + problem.penalty.strong_convexity * v.w)

        def unfinished(cg: _CG) -> jax.Array:
            return (cg.squared > enough**2) & (cg.num_products < self.max_products) & ~cg.flat

        def more(cg: _CG) -> _CG:
            hp = product(cg.p)
            bend = dot(cg.p, hp)
            # Flat along p, save for rounding: stop with what there is.
            flat = ~(bend > 4 * jnp.finfo(bend.dtype).eps * norm(cg.p) * norm(hp))
            length = jnp.where(flat, 0.0, cg.squared / bend)
            x, r = add(cg.x, length, cg.p), add(cg.r, -length, hp)
            squared = dot(r, r)
            return _CG(x, r, add(r, squared / cg.squared, cg.p), squared, cg.num_products + 1, flat)

        zero = jax.tree.map(jnp.zeros_like, state.gradient)
        r = add(zero, -1.0, state.gradient)
        start = _CG(zero, r, r, dot(r, r), jnp.zeros((), jnp.int32), jnp.zeros((), bool))
        found = jax.lax.while_loop(unfinished, more, start)
        # Flat from the start (no curvature at all): downhill.
        return jax.tree.map(
            lambda x, g: jnp.where(found.flat & (found.num_products == 1), -g, x),
            found.x,
            state.gradient,
        )

    def measure(self, problem, state):
        return state.value, norm(state.gradient)


def newton_cg(max_products: int = 200) -> NewtonCG:
    """``p <- p + t d``, where d solves ``∇²P d = -∇P`` by conjugate gradients, t by backtracking.

    The system is solved to a residual of ``min(1/2, √|∇P|) |∇P|``, which makes the rate
    superlinear (order 3/2). A product with the Hessian costs one with X and one with Xᵀ, and no
    matrix is kept.

    Args:
      max_products: Most Hessian products of a step.

    For differentiable losses and smooth penalties. Certificate: ``|∇P|``.

    Reference: Nocedal & Wright, "Numerical Optimization", 2006, algorithm 7.1.
    """
    if max_products < 1:
        raise ValueError(f"newton_cg(max_products={max_products}): expected at least 1.")
    return NewtonCG(int(max_products))
