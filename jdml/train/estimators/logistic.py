"""Logistic regression, of two classes or of more."""

from typing import Any

import numpy as np
import scipy.special

from jdml.models.linear import logistic, multinomial
from jdml.train.estimators.base import check_number, penalty_of
from jdml.train.estimators.classification import LinearClassifier


class LogisticRegression(LinearClassifier):
    """``min C Σ_i s_i φ(x_iᵀw + b, y_i) + r |w|_1 + (1 - r)/2 |w|²``.

    φ is ``log(1 + e^{-ya})`` with ``y = ±1`` for two classes; for more it is
    ``log Σ_c e^{a_c} - a_y``, with a w and a b for each class.

    Args:
      penalty: "elasticnet"; "l2" and "l1", which are r = 0 and r = 1; None for none.
      C: > 0; infinity is no penalty.
      l1_ratio: r, in [0, 1].
      fit_intercept: Whether there is a b, which is never penalised.
      class_weight: A factor of s for each class, by label (1 if not named), or "balanced":
        ``Σ s / (classes · Σ_{i of the class} s_i)``.
      solver, tol, max_iter, random_state, verbose: See :class:`LinearRegression`.

    Attributes:
      classes_: ``[classes]``, sorted.
      coef_: ``[1, d]`` of ``classes_[1]``, or ``[classes, d]``.
      intercept_: ``[1]`` or ``[classes]``.
      n_iter_: Steps taken.
      certificate_: The solver's certificate at the answer.
      n_features_in_, feature_names_in_: As in scikit-learn.
    """

    def __init__(
        self,
        penalty: str | None = "elasticnet",
        *,
        C: float = 1.0,
        l1_ratio: float = 0.0,
        fit_intercept: bool = True,
        class_weight: Any = None,
        solver: Any = "auto",
        tol: float = 1e-8,
        max_iter: int | None = None,
        random_state: Any = 0,
        verbose: int = 0,
    ):
        self.penalty = penalty
        self.C = C
        self.l1_ratio = l1_ratio
        self.fit_intercept = fit_intercept
        self.class_weight = class_weight
        self.solver = solver
        self.tol = tol
        self.max_iter = max_iter
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "LogisticRegression":
        """Fits ``coef_`` and ``intercept_``.

        Args:
          X: ``[n, d]``, dense or SciPy sparse; f32 is fitted in f32, all else in f64.
          y: ``[n]``, labels of any kind, at least two different ones.
          sample_weight: ``[n]``, >= 0.

        Raises:
          ValueError: parameters out of range, input with NaN, labels that are no classes, or a
            solver that cannot do the problem (those that can are named).
        """
        self._check_parameters()
        ratio = self._ratio()
        strength = 0.0 if ratio is None else 1 / check_number(self, "C", above=True, inf=True)
        X, numbers, weight = self._checked_classes(X, y, sample_weight)
        strength /= weight.sum()
        penalty = penalty_of(strength * (ratio or 0), strength * (1 - (ratio or 0)))
        if len(self.classes_) == 2:
            found = self._fit(X, [2.0 * numbers - 1], weight, logistic(), penalty)
        else:
            found = self._fit(X, [numbers], weight, multinomial(len(self.classes_)), penalty)
        self._keep(found)
        return self

    def _ratio(self) -> float | None:
        ratio = check_number(self, "l1_ratio", most=1)
        if self.penalty is None:
            return None
        if self.penalty == "elasticnet":
            return ratio
        fixed = {"l2": 0.0, "l1": 1.0}.get(self.penalty)
        if fixed is None:
            raise ValueError(
                f"LogisticRegression(penalty={self.penalty!r}): expected 'elasticnet', 'l2', 'l1' "
                "or None."
            )
        if ratio not in (0, fixed):
            raise ValueError(
                f"LogisticRegression(penalty={self.penalty!r}, l1_ratio={ratio:g}): the two "
                "contradict each other; leave one of them out."
            )
        return fixed

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities ``[n, classes]``, in the order of ``classes_``."""
        margins = self.decision_function(X)
        if margins.ndim == 1:
            return np.stack([scipy.special.expit(-margins), scipy.special.expit(margins)], axis=1)
        return scipy.special.softmax(margins, axis=1)

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """Their logarithms."""
        margins = self.decision_function(X)
        if margins.ndim == 1:
            return -np.logaddexp(0, np.stack([margins, -margins], axis=1))
        return scipy.special.log_softmax(margins, axis=1)
