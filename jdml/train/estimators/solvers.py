"""Which method solves which problem."""

import inspect
from collections.abc import Callable
from typing import Any

from jdml import optimize
from jdml.models.linear import Dense, LinearProblem
from jdml.optimize import Method, coordinate_descent, newton_cg, newton_cholesky, proximal, sdca

_NAMES = (
    *("accelerated", "coordinate_descent", "cyclic_dual_ascent", "dual_newton"),
    *("gradient_descent", "lbfgs", "newton_cg", "newton_cholesky", "proximal", "quasi_newton"),
    *("saga", "sdca", "sdna", "svrg"),
)
SOLVERS: dict[str, Callable[..., Method]] = {name: getattr(optimize, name) for name in _NAMES}
"""Methods that a name alone makes."""

SMALL = 256
"""Most parameters for which Newton's method with a matrix is taken without being asked for."""

NEWTON_STEPS, OTHER_STEPS = 100, 10_000
"""``max_iter`` by default."""


def method_for(solver: str | Method, problem: LinearProblem, seed: int) -> Method:
    """The method that ``solver`` says, or for "auto" the one that suits the problem.

    - hinge: ``sdca``;
    - a penalty with a corner (l1, elastic net): ``coordinate_descent`` for a squared loss and dense
      rows, for the scales of columns do not matter to it; otherwise ``proximal``;
    - all else: ``newton_cholesky`` up to ``SMALL`` parameters whose columns do not depend on each
      other or are penalised, otherwise ``newton_cg``, which from 0 leads to the least of all
      minima.

    Raises:
      ValueError: there is no such solver. That one cannot do the problem is found by ``solve``.
    """
    if isinstance(solver, Method):
        return solver
    if solver == "auto":
        return _auto(problem, seed)
    if not isinstance(solver, str) or solver not in SOLVERS:
        raise ValueError(
            f'solver={solver!r}; expected "auto", a method of jdml.optimize, or the name of one: '
            f"{', '.join(SOLVERS)}."
        )
    return _made(SOLVERS[solver], seed)


def steps_of(method: Method) -> int:
    """Most steps by default."""
    return NEWTON_STEPS if "newton" in method.name and method.order == "second" else OTHER_STEPS


def _auto(problem: LinearProblem, seed: int) -> Method:
    if not problem.loss.differentiable:
        return sdca(seed=seed)
    if not problem.penalty.smooth:
        by_columns = problem.loss.name == "squared" and isinstance(problem.rows, Dense)
        return coordinate_descent(seed) if by_columns else proximal()
    if problem.rows.shape[1] * (problem.loss.num_outputs or 1) > SMALL:
        return newton_cg()
    try:
        newton_cholesky().check(problem)
    except ValueError:  # columns depend on each other, and nothing is penalised
        return newton_cg()
    return newton_cholesky()


def _made(factory: Callable[..., Any], seed: int) -> Method:
    return factory(**({"seed": seed} if "seed" in inspect.signature(factory).parameters else {}))
