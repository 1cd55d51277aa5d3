"""Linear regression, with a squared loss and any penalty, and of counts."""

from typing import Any

import numpy as np
from sklearn.base import RegressorMixin

from jdml.models.linear import poisson, squared
from jdml.models.linear.losses import Loss
from jdml.models.linear.penalties import Penalty
from jdml.train.estimators.base import LinearEstimator, check_number, penalty_of


class _Regressor(RegressorMixin, LinearEstimator):
    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        """Fits ``coef_`` and ``intercept_``.

        Args:
          X: ``[n, d]``, dense or SciPy sparse; f32 is fitted in f32, all else in f64.
          y: ``[n]``.
          sample_weight: ``[n]``, >= 0.

        Raises:
          ValueError: parameters out of range, input with NaN, labels that the loss does not take,
            or a solver that cannot do the problem (those that can are named).
        """
        self._check_parameters()
        X, y, weight = self._checked(X, y, sample_weight, y_numeric=True)
        loss, penalty = self._objective(weight.sum())
        (found,) = self._fit(X, [y], weight, loss, penalty)
        self.coef_, self.intercept_ = found.w, float(found.b)
        self.n_iter_, self.certificate_ = found.num_steps, found.certificate
        return self

    def predict(self, X: Any) -> np.ndarray:
        """``Xw + b``, ``[n]``."""
        return self._margins(X)

    def _objective(self, total: float) -> tuple[Loss, Penalty]:
        """Of weights that sum to ``total``."""
        raise NotImplementedError


class LinearRegression(_Regressor):
    """Least squares: ``min Σ_i s_i (y_i - x_iᵀw - b)²``.

    Where columns depend on each other, "auto" gives the minimum of least ``|w|``.

    Args:
      fit_intercept: Whether there is a b, which is never penalised.
      solver: "auto" (``solvers.py`` has the choice), a method of ``jdml.optimize``, or its name;
        one that cannot do the problem is refused, and those that can are named.
      tol: What the certificate must fall to, in units of what it is at ``w = 0``: of a bound on the
        gradient's norm there, or for duality gaps of the objective. No less than 16 machine
        epsilons (4 of a gap) are asked for.
      max_iter: Most steps of the solver; by default 100 of Newton's methods, 10,000 of others.
      random_state: Seed of solvers that draw.
      verbose: Whether to show a line of progress.

    Attributes:
      coef_: ``[d]``.
      intercept_: A float.
      n_iter_: Steps taken.
      certificate_: The solver's certificate at the answer.
      n_features_in_, feature_names_in_: As in scikit-learn.
    """

    def __init__(
        self,
        *,
        fit_intercept: bool = True,
        solver: Any = "auto",
        tol: float = 1e-8,
        max_iter: int | None = None,
        random_state: Any = 0,
        verbose: int = 0,
    ):
        self.fit_intercept = fit_intercept
        self.solver = solver
        self.tol = tol
        self.max_iter = max_iter
        self.random_state = random_state
        self.verbose = verbose

    def _objective(self, total):
        return squared(), penalty_of(0, 0)


class _Penalised(_Regressor):
    """With a strength ``alpha >= 0``."""

    def __init__(
        self,
        alpha: float = 1.0,
        *,
        fit_intercept: bool = True,
        solver: Any = "auto",
        tol: float = 1e-8,
        max_iter: int | None = None,
        random_state: Any = 0,
        verbose: int = 0,
    ):
        self.alpha = alpha
        self.fit_intercept = fit_intercept
        self.solver = solver
        self.tol = tol
        self.max_iter = max_iter
        self.random_state = random_state
        self.verbose = verbose


class Ridge(_Penalised):
    """``min Σ_i s_i (y_i - x_iᵀw - b)² + alpha |w|²``.

    Args:
      alpha: >= 0.

    Other arguments and attributes: see :class:`LinearRegression`.
    """

    def _objective(self, total):
        return squared(), penalty_of(0, 2 * check_number(self, "alpha") / total)


class Lasso(_Penalised):
    """``min Σ_i s_i (y_i - x_iᵀw - b)² / (2 Σ_i s_i) + alpha |w|_1``.

    Args:
      alpha: >= 0.

    Other arguments and attributes: see :class:`LinearRegression`.
    """

    def _objective(self, total):
        return squared(), penalty_of(2 * check_number(self, "alpha"), 0)


class ElasticNet(_Regressor):
    """``min Σ_i s_i (y_i - x_iᵀw - b)² / (2 Σ_i s_i) + alpha (r |w|_1 + (1 - r)/2 |w|²)``.

    Args:
      alpha: >= 0.
      l1_ratio: r, in [0, 1].

    Other arguments and attributes: see :class:`LinearRegression`.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        *,
        l1_ratio: float = 0.5,
        fit_intercept: bool = True,
        solver: Any = "auto",
        tol: float = 1e-8,
        max_iter: int | None = None,
        random_state: Any = 0,
        verbose: int = 0,
    ):
        self.alpha = alpha
        self.l1_ratio = l1_ratio
        self.fit_intercept = fit_intercept
        self.solver = solver
        self.tol = tol
        self.max_iter = max_iter
        self.random_state = random_state
        self.verbose = verbose

    def _objective(self, total):
        alpha, ratio = check_number(self, "alpha"), check_number(self, "l1_ratio", most=1)
        return squared(), penalty_of(2 * alpha * ratio, 2 * alpha * (1 - ratio))


class PoissonRegressor(_Penalised):
    """Counts of mean ``e^a``, ``a = xᵀw + b``: ``min Σ_i s_i (e^{a_i} - y_i a_i) / Σ_i s_i +
    alpha/2 |w|²``, for ``y >= 0``.

    Args:
      alpha: >= 0.

    Other arguments and attributes: see :class:`LinearRegression`.
    """

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.positive_only = True
        return tags

    def _objective(self, total):
        return poisson(), penalty_of(0, check_number(self, "alpha"))

    def predict(self, X: Any) -> np.ndarray:
        """``e^{Xw + b}``, ``[n]``."""
        return np.exp(self._margins(X))

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """D², the share of the deviance explained; 1 at best."""
        from sklearn.metrics import d2_tweedie_score

        return d2_tweedie_score(y, self.predict(X), sample_weight=sample_weight, power=1)
