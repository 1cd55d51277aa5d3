"""Newton's method with the Hessian as a matrix, factorised by Cholesky."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax.flatten_util import ravel_pytree

from jdml.optimize.base import Method, Problem, dot, norm, smooth_refusal
from jdml.optimize.first_order.majorise import point
from jdml.optimize.second_order.descent import at, backtrack

MOST = 16384
"""Most parameters: their Hessian takes 2 GiB in f64."""


@dataclasses.dataclass(frozen=True)
class NewtonCholesky(Method):
    name = "newton_cholesky"
    certificate = "gradient norm"
    order = "second"
    sampling = "deterministic"

    @classmethod
    def refusal(cls, problem):
        size = problem.rows.shape[1] * (problem.loss.num_outputs or 1)
        if size > MOST:
            return f"{size} parameters want a Hessian of {size} × {size}; at most {MOST}"
        if getattr(problem.rows, "grid", (1, 1))[1] > 1:
            return "the rows are divided by feature, and no worker has two columns of other parts"
        return smooth_refusal(problem)

    def check(self, problem):
        super().check(problem)
        if float(problem.penalty.strong_convexity) == 0:
            _refuse_dependent_columns(problem)

    def init(self, problem, params):
        return at(problem, point(problem, params))

    def step(self, problem, state):
        gradient, unravel = ravel_pytree(state.gradient)
        matrix = _whole_hessian(problem, state.point.margins)
        direction = unravel(_solve(matrix, -gradient, jnp.linalg.norm(gradient)))
        return backtrack(problem, state, direction, dot(state.gradient, direction))

    def measure(self, problem, state):
        return state.value, norm(state.gradient)


def _whole_hessian(problem: Problem, margins: jax.Array) -> jax.Array:
    """With the penalty, and definite where margins of all classes may be shifted alike."""
    matrix = problem.hessian(margins)
    size, outputs = problem.rows.shape[1], problem.loss.num_outputs
    strength = jnp.full(size * (outputs or 1), problem.penalty.strong_convexity, matrix.dtype)
    matrix = matrix + jnp.diag(jnp.pad(strength, (0, len(matrix) - len(strength))))
    if outputs is None:
        return matrix
    # The same added to all classes of a feature changes no probability. The gradient has no part
    # along it, so that any curvature given to it leaves the Newton step as it is.
    alike = jnp.full((outputs, outputs), 1 / outputs, matrix.dtype)
    scale = jnp.trace(matrix) / len(matrix)
    free = jnp.ones(len(matrix) // outputs, matrix.dtype)
    return matrix + scale * jnp.kron(jnp.diag(free), alike)


def _solve(matrix: jax.Array, right: jax.Array, least: jax.Array) -> jax.Array:
    """By Cholesky. Where curvature is missing (a hinge that is flat or straight for all samples),
    ``least`` is added to the diagonal, and ten times more until there is a factor: with ``least``
    the gradient's norm, the step is no longer than 1, and near the minimum little is added.
    """
    mean = jnp.trace(matrix) / len(matrix)
    eye = jnp.eye(len(matrix), dtype=matrix.dtype)
    tiny = len(matrix) * jnp.finfo(matrix.dtype).eps * mean

    def factorised(added: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.linalg.cholesky(matrix + added * eye), added

    def fails(carry: tuple[jax.Array, jax.Array]) -> jax.Array:
        factor, added = carry
        found = jnp.min(jnp.diag(factor)) ** 2 > tiny  # not so for NaN
        return ~found & (added < mean + least)

    def more(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return factorised(jnp.maximum(10 * carry[1], least))

    factor, _ = jax.lax.while_loop(fails, more, factorised(jnp.zeros_like(mean)))
    return jax.scipy.linalg.cho_solve((factor, True), right)


def _refuse_dependent_columns(problem: Problem) -> None:
    """Raises if columns of X (and the intercept's) depend on each other."""
    gram = np.asarray(_second_moments(problem), np.float64)
    scale = np.sqrt(np.diag(gram))
    scale[scale == 0] = 1
    triangle, order = scipy.linalg.qr(gram / np.outer(scale, scale), mode="r", pivoting=True)
    sizes = np.abs(np.diag(triangle))
    rank = int((sizes > len(gram) * np.finfo(problem.dtype).eps * sizes[0]).sum())
    if rank == len(gram):
        return
    d = problem.rows.shape[1]
    names = ["the intercept" if j == d else str(j) for j in sorted(order[rank:])]
    shown = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
    raise ValueError(
        f"newton_cholesky: X has rank {rank} of {len(gram)} columns"
        f"{', the intercept counted' if problem.intercept else ''}: those numbered {shown} follow "
        "from the others, so that without a regulariser the minimum is not one point. Give a "
        "penalty l2(strength > 0), leave these columns out, or take lbfgs or newton_cg."
    )


@jax.jit
def _second_moments(problem: Problem) -> jax.Array:
    weights = problem.sample_weight / problem.num_samples
    block = problem.rows.gram(weights)
    if not problem.intercept:
        return block
    edge = problem.rows.rmatvec(weights)[:, None]
    return jnp.block([[block, edge], [edge.T, jnp.sum(weights)[None, None]]])


def newton_cholesky() -> NewtonCholesky:
    """``p <- p - t (∇²P)⁻¹ ∇P``, t by backtracking; the rate is quadratic near the minimum.

    A step costs ``n d²`` operations for the Hessian and ``d³/3`` for its factor, and ``d²`` numbers
    of memory (``d`` times the outputs for a multinomial loss). Sparse rows are spread out a
    thousand at a time for it.

    For twice differentiable losses (and the squared and smoothed hinges, whose curvature jumps) and
    smooth penalties. Without a strongly convex penalty the columns of X, and ones if there is an
    intercept, must not depend on each other; which do is told. Certificate: ``|∇P|``.

    Reference: Boyd & Vandenberghe, "Convex Optimization", 2004, section 9.5.
    """
    return NewtonCholesky()
