"""Problems of every loss on a data set, and scikit-learn's most precise solver for each.

Every set gives labels of every kind from one target: what is above the middle of its range, its
classes (of a continuous one, its thirds), itself with mean 0 and deviation 1, and counts, its range
cut into eight. Penalties are l2 of a given strength, a tenth of the l1 at which all weights are 0
(lasso), or half of that with l2 (elastic net). Where scikit-learn has no such loss (the smoothed
hinge), SciPy's L-BFGS-B on an objective written in NumPy stands in. The intercept is not penalised;
losses for which liblinear would penalise it have none.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize
import scipy.sparse
from sklearn import linear_model, svm

from jdml.models.linear import (
    LinearProblem,
    Weights,
    elastic_net,
    hinge,
    l1,
    l2,
    logistic,
    multinomial,
    poisson,
    smoothed_hinge,
    squared,
    squared_hinge,
)

GAMMA = 0.5
"""Of the smoothed hinge."""
SMALL = 256
"""Most parameters for which a Hessian is made as a matrix."""


class Case(NamedTuple):
    """A loss on a data set.

    Attributes:
      x: ``[n, d]`` in f64, dense or CSR.
      y: Labels as the loss takes them.
      loss, penalty, intercept: As of ``LinearProblem``.
      strength: λ of l2.
      fit: ``case -> a fitted model of scikit-learn's, or Weights``.
    """

    x: Any
    y: np.ndarray
    loss: Any
    penalty: Any
    intercept: bool
    strength: float
    fit: Callable[[Case], Any]

    def problem(self, dtype: Any = np.float64) -> LinearProblem:
        return LinearProblem(
            self.x.astype(dtype), self.y, self.loss, self.penalty, intercept=self.intercept
        )

    @property
    def num_params(self) -> int:
        return self.x.shape[1] * (self.loss.num_outputs or 1)

    @property
    def by_matrix(self) -> bool:
        """Whether Newton's method with a matrix is for it."""
        return self.num_params <= SMALL


def signs(target: np.ndarray) -> np.ndarray:
    return np.where(target > (target.min() + target.max()) / 2, 1.0, -1.0)


def classes(target: np.ndarray) -> np.ndarray:
    found, numbers = np.unique(target, return_inverse=True)
    if len(found) <= 10:
        return numbers
    return np.searchsorted(np.quantile(target, [1 / 3, 2 / 3]), target)


def numbers(target: np.ndarray) -> np.ndarray:
    return (target - target.mean()) / target.std()


def counts(target: np.ndarray) -> np.ndarray:
    low, high = target.min(), target.max()
    return np.floor(8 * (target - low) / (high - low))


def cases(x: Any, target: np.ndarray, strength: float) -> dict[str, Case]:
    """A case of each loss."""
    y = numbers(target)
    # With an intercept, all weights are 0 from this l1 on.
    largest = 2 * np.abs(x.T @ y).max() / len(y)
    lasso, half = l1(0.1 * largest), elastic_net(0.05 * largest, strength)
    kinds = classes(target)
    ridge = l2(strength)
    of_each = {
        "ridge": (y, squared(), ridge, True, _ridge),
        "lasso": (y, squared(), lasso, True, _coordinates),
        "elastic net": (y, squared(), half, True, _coordinates),
        "logistic": (signs(target), logistic(), ridge, True, _logistic),
        "multinomial": (kinds, multinomial(int(kinds.max()) + 1), ridge, True, _logistic),
        "hinge": (signs(target), hinge(), ridge, False, _hinge),
        "squared hinge": (signs(target), squared_hinge(), ridge, False, _squared_hinge),
        "smoothed hinge": (signs(target), smoothed_hinge(GAMMA), ridge, True, _smoothed_hinge),
        "poisson": (counts(target), poisson(), ridge, True, _poisson),
    }
    return {
        name: Case(x, labels, loss, penalty, intercept, strength, fit)
        for name, (labels, loss, penalty, intercept, fit) in of_each.items()
    }


def reference(case: Case) -> tuple[Weights, float]:
    """Weights by the best solver there is elsewhere, and the seconds that it took."""
    with warnings.catch_warnings():
        # Tolerances are at the end of what a solver reaches; how far it came is what is compared.
        warnings.simplefilter("ignore")
        began = time.perf_counter()
        found = case.fit(case)
        seconds = time.perf_counter() - began
    if isinstance(found, Weights):
        return found, seconds
    w, b = np.asarray(found.coef_), np.asarray(found.intercept_)
    if case.loss.num_outputs is None:
        w, b = w.ravel(), b.reshape(())
    elif case.loss.num_outputs == 2:
        # One column of differences: half to each class, which is the least of all penalties.
        w, b = np.vstack([-w / 2, w / 2]).T, np.concatenate([-b / 2, b / 2])
    else:
        w = w.T
    return Weights(w, b if case.intercept else None), seconds


def _ridge(case: Case) -> Any:
    # Σ (y - a)² + alpha |w|²
    n = len(case.y)
    small = "svd" if n < 10_000 else "cholesky"
    solver = "sparse_cg" if scipy.sparse.issparse(case.x) else small
    model = linear_model.Ridge(alpha=case.strength * n / 2, solver=solver, tol=1e-13)
    return model.fit(case.x, case.y)


def _coordinates(case: Case) -> Any:
    # Σ (y - a)² / 2n + alpha (ratio |w|_1 + (1 - ratio)/2 |w|²), half of ours
    one, two = float(case.penalty.l1), float(case.penalty.l2)
    wide = case.x.shape[1] > 1000
    model = linear_model.ElasticNet(
        alpha=(one + two) / 2, l1_ratio=one / (one + two), tol=1e-11 if wide else 1e-13,
        max_iter=500 if wide else 5000, precompute=not wide,
    )  # fmt: skip
    x = scipy.sparse.csc_array(case.x) if scipy.sparse.issparse(case.x) else case.x
    return model.fit(x, case.y)


def _logistic(case: Case) -> Any:
    # C Σ φ + |w|²/2. With two classes given as such, w is the difference of theirs: with half of
    # it for each, |w|² is half as much.
    scale = 2 if case.loss.num_outputs == 2 else 1
    model = linear_model.LogisticRegression(
        C=scale / (case.strength * len(case.y)), tol=1e-9, max_iter=1000,
        solver="newton-cholesky" if case.by_matrix else "newton-cg",
    )  # fmt: skip
    return model.fit(case.x, case.y)


def _hinge(case: Case) -> Any:
    # C Σ max(0, 1 - ya) + |w|²/2
    n = len(case.y)
    model = svm.LinearSVC(
        C=1 / (case.strength * n), loss="hinge", dual=True, tol=1e-10, fit_intercept=False,
        max_iter=300 if n > 10_000 else 100_000, random_state=4,
    )  # fmt: skip
    return model.fit(case.x, case.y)


def _squared_hinge(case: Case) -> Any:
    model = svm.LinearSVC(
        C=1 / (case.strength * len(case.y)), dual=False, tol=1e-10, fit_intercept=False,
        max_iter=10_000,
    )  # fmt: skip
    return model.fit(case.x, case.y)


def _smoothed_hinge(case: Case) -> Weights:
    x, y, n = case.x, case.y, len(case.y)

    def objective(params: np.ndarray) -> tuple[float, np.ndarray]:
        w, b = params[:-1], params[-1]
        short = np.maximum(0, 1 - y * (x @ w + b))
        value = np.where(short < GAMMA, short**2 / (2 * GAMMA), short - GAMMA / 2).mean()
        slopes = -y * np.minimum(short / GAMMA, 1) / n
        gradient = np.append(x.T @ slopes + case.strength * w, slopes.sum())
        return value + case.strength / 2 * w @ w, gradient

    found = scipy.optimize.minimize(
        objective, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B",
        options={"ftol": 0, "gtol": 1e-9, "maxiter": 3000, "maxfun": 5000, "maxcor": 30},
    )  # fmt: skip
    return Weights(found.x[:-1], found.x[-1])


def _poisson(case: Case) -> Any:
    model = linear_model.PoissonRegressor(
        alpha=case.strength, tol=1e-10, max_iter=5000,
        solver="newton-cholesky" if case.by_matrix else "lbfgs",
    )  # fmt: skip
    return model.fit(case.x, case.y)
