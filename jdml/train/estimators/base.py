"""What all linear estimators share: from checked arrays to fitted weights."""

import contextlib
import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from jdml.models.linear import LinearProblem, as_rows, elastic_net, l1, l2, none
from jdml.models.linear.losses import Loss
from jdml.models.linear.penalties import Penalty
from jdml.models.linear.problem import checked_sample_weight
from jdml.models.linear.rows import check_finite
from jdml.optimize import solve
from jdml.train.estimators.rows import prepare, weighted_mean, with_column
from jdml.train.estimators.solvers import method_for, steps_of

SLOPE_REACHED, GAP_REACHED = 16, 4
"""Machine epsilons below which no tolerance is asked for."""

DTYPES = [np.float64, np.float32]


class Fitted(NamedTuple):
    """Attributes:
    w: ``[d]`` or ``[d, outputs]``.
    b: ``[]`` or ``[outputs]``, 0 without an intercept.
    num_steps: Steps taken.
    certificate: The method's, at the answer.
    """

    w: np.ndarray
    b: np.ndarray
    num_steps: int
    certificate: float


class LinearEstimator(BaseEstimator):
    """Parameters that all have: ``fit_intercept``, ``solver``, ``tol``, ``max_iter``,
    ``random_state``, ``verbose``."""

    fit_intercept: bool
    solver: Any
    tol: float
    max_iter: int | None
    random_state: Any
    verbose: int
    coef_: np.ndarray
    intercept_: Any

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    def _checked(self, X: Any, y: Any, sample_weight: Any, **how: Any) -> tuple[Any, Any, Any]:
        X, y = validate_data(
            self, X, y, accept_sparse="csr", dtype=DTYPES, ensure_all_finite=False, **how
        )
        check_finite(X)
        return X, y, checked_sample_weight(sample_weight, X.shape[0])

    def _margins(self, X: Any) -> np.ndarray:
        """``[n]`` or ``[n, outputs]``, on the host."""
        check_is_fitted(self)
        X = validate_data(
            self, X, accept_sparse="csr", dtype=DTYPES, ensure_all_finite=False, reset=False
        )
        check_finite(X)  # which, unlike scikit-learn, names the rows
        return np.asarray(X @ self.coef_.T) + self.intercept_

    def _fit(
        self,
        x: Any,
        targets: Sequence[np.ndarray],
        weight: np.ndarray,
        loss: Loss,
        penalty: Penalty,
        penalised_intercept: float = 0.0,
    ) -> list[Fitted]:
        """One set of weights for each set of targets ``[n]``, of the same rows.

        ``penalised_intercept``: if not 0, the value of a column of X that is the intercept.
        """
        seed = check_random_state(self.random_state).randint(2**31 - 1)
        column = penalised_intercept if self.fit_intercept else 0.0
        if column:
            x = with_column(x, column)
        free = bool(self.fit_intercept) and not column
        dense = not scipy.sparse.issparse(x)
        rows = prepare(x, weight, centre=free, fill_columns=penalty.name != "none")
        # Of centred columns, the best intercept of a squared loss is the labels' mean.
        known = free and dense and loss.name == "squared"
        found = []
        # f64 data is solved in f64, whatever the session's default is.
        with jax.enable_x64(True) if x.dtype == np.float64 else contextlib.nullcontext():
            shared = as_rows(rows.x)
            for y in targets:
                shift = weighted_mean(y, weight) if known else 0.0
                labels = rows.labels(y - shift if known else y)
                problem = LinearProblem(
                    shared, labels, loss, penalty, rows.weight, free and not known
                )
                params, num_steps, certificate = self._solve(problem, seed)
                w = rows.weights(np.asarray(params.w))
                b = shift if params.b is None else np.asarray(params.b)
                if column:
                    w, b = w[:-1], column * w[-1]
                found.append(
                    Fitted(w, np.asarray(b - rows.means[: len(w)] @ w), num_steps, certificate)
                )
        return found

    def _solve(self, problem: LinearProblem, seed: int) -> tuple[Any, int, float]:
        method = method_for(self.solver, problem, seed)
        value, slope = map(float, _at_start(problem))
        gap = method.certificate == "duality gap"
        scale, least = (value, GAP_REACHED) if gap else (slope, SLOPE_REACHED)
        tol = max(self.tol, least * float(jnp.finfo(problem.dtype).eps)) * scale
        solution = solve(
            problem,
            method,
            tol=tol,
            max_steps=steps_of(method) if self.max_iter is None else self.max_iter,
            progress=bool(self.verbose),
        )
        if not solution.converged:
            warnings.warn(
                f"{type(self).__name__}: {method.name} ended after {solution.num_steps} steps with "
                f"a {method.certificate} of {solution.certificate:.2e}; expected at most "
                f"{tol:.2e}. "
                "Raise max_iter or tol, scale the columns of X, or take another solver.",
                ConvergenceWarning,
                stacklevel=4,
            )
        return solution.params, solution.num_steps, solution.certificate

    def _check_parameters(self) -> None:
        """Raises ``ValueError`` for what every estimator has."""
        check_number(self, "tol")
        if self.max_iter is not None and not (
            isinstance(self.max_iter, (int, np.integer)) and self.max_iter >= 1
        ):
            raise ValueError(
                f"{type(self).__name__}(max_iter={self.max_iter!r}): expected a whole number >= 1, "
                "or None."
            )


@jax.jit
def _at_start(problem: LinearProblem) -> tuple[jax.Array, jax.Array]:
    """The objective at 0, and a bound on the gradient's norm there, by which tolerances scale.

    The bound, ``√(Σ s φ'²/n) √(Σ s (|x|² + 1)/n)``, stays off 0 where the gradient is 0 by chance.
    """
    margins = problem.margins(problem.init())
    slopes = problem.loss.derivative(margins, problem.y)
    slopes = jnp.sum(slopes.reshape(problem.num_samples, -1) ** 2, axis=1)
    sizes = problem.rows.squared_norms() + problem.intercept
    weight = problem.sample_weight
    return problem.loss_at(margins), jnp.sqrt(jnp.mean(weight * slopes) * jnp.mean(weight * sizes))


def check_number(
    estimator: Any, name: str, *, above: bool = False, most: float = math.inf, inf: bool = False
) -> float:
    """A parameter as a float; raises ``ValueError`` unless it is a number >= 0 (> 0 if ``above``),
    at most ``most``, finite unless ``inf``."""
    value = getattr(estimator, name)
    number = isinstance(value, (int, float, np.integer, np.floating)) and not math.isnan(value)
    enough = number and (value > 0 if above else value >= 0)
    if not (enough and value <= most and (inf or math.isfinite(value))):
        expected = f"a number {'>' if above else '>='} 0"
        expected += f" and <= {most:g}" if math.isfinite(most) else ""
        expected += ", or infinity" if inf else ""
        raise ValueError(f"{type(estimator).__name__}({name}={value!r}): expected {expected}.")
    return float(value)


def penalty_of(strength_l1: float, strength_l2: float) -> Penalty:
    """``strength_l1 |w|_1 + strength_l2/2 |w|²``, by the simplest penalty that is this."""
    if strength_l1 == 0:
        return l2(strength_l2) if strength_l2 else none()
    return elastic_net(strength_l1, strength_l2) if strength_l2 else l1(strength_l1)
