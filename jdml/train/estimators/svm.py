"""Linear support vector machines."""

from typing import Any

import numpy as np

from jdml.models.linear import hinge, smoothed_hinge, squared_hinge
from jdml.models.linear.losses import Loss
from jdml.train.estimators.base import check_number, penalty_of
from jdml.train.estimators.classification import LinearClassifier


class LinearSVC(LinearClassifier):
    """``min C Σ_i s_i φ(y_i (x_iᵀw + b)) + |w|²/2``, or ``|w|_1``; one class against the rest.

    For ``loss="hinge"``, which has a dual alone, the intercept is that of liblinear: b is
    ``intercept_scaling`` times the weight of one more column with that value, so that
    ``(b / intercept_scaling)²/2`` is penalised as well. For the others it is not penalised, and
    ``intercept_scaling`` unused. (scikit-learn's ``LinearSVC`` penalises it for all.)

    Args:
      penalty: "l2" or "l1"; the hinge wants l2.
      loss: "squared_hinge", "hinge" or "smoothed_hinge" (its corner rounded).
      smoothing: The width over which the smoothed hinge's corner is rounded, > 0.
      C: > 0.
      fit_intercept: Whether there is a b.
      intercept_scaling: > 0; the larger it is, the less is the hinge's b penalised, and the slower
        the solver.
      class_weight: See :class:`LogisticRegression`.
      solver, tol, max_iter, random_state, verbose: See :class:`LinearRegression`.

    Attributes:
      classes_: ``[classes]``, sorted.
      coef_: ``[1, d]`` of ``classes_[1]``, or ``[classes, d]``.
      intercept_: ``[1]`` or ``[classes]``.
      n_iter_, certificate_: The most steps taken, and the largest certificate, of all classes.
      n_features_in_, feature_names_in_: As in scikit-learn.
    """

    def __init__(
        self,
        penalty: str = "l2",
        loss: str = "squared_hinge",
        *,
        smoothing: float = 1.0,
        C: float = 1.0,
        fit_intercept: bool = True,
        intercept_scaling: float = 1.0,
        class_weight: Any = None,
        solver: Any = "auto",
        tol: float = 1e-8,
        max_iter: int | None = None,
        random_state: Any = 0,
        verbose: int = 0,
    ):
        self.penalty = penalty
        self.loss = loss
        self.smoothing = smoothing
        self.C = C
        self.fit_intercept = fit_intercept
        self.intercept_scaling = intercept_scaling
        self.class_weight = class_weight
        self.solver = solver
        self.tol = tol
        self.max_iter = max_iter
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "LinearSVC":
        """Fits ``coef_`` and ``intercept_``; arguments and errors as of LogisticRegression."""
        self._check_parameters()
        loss = self._loss()
        if self.penalty not in ("l2", "l1"):
            raise ValueError(f"LinearSVC(penalty={self.penalty!r}): expected 'l2' or 'l1'.")
        if self.penalty == "l1" and not loss.differentiable:
            raise ValueError(
                "LinearSVC(penalty='l1', loss='hinge'): no method here does both; take "
                "loss='squared_hinge' or 'smoothed_hinge', or penalty='l2'."
            )
        C = check_number(self, "C", above=True)
        column = check_number(self, "intercept_scaling", above=True)
        X, numbers, weight = self._checked_classes(X, y, sample_weight)
        strength = 1 / (C * weight.sum())
        penalty = penalty_of(strength, 0) if self.penalty == "l1" else penalty_of(0, strength)
        positive = [1] if len(self.classes_) == 2 else range(len(self.classes_))
        targets = [np.where(numbers == number, 1.0, -1.0) for number in positive]
        self._keep(
            self._fit(X, targets, weight, loss, penalty, 0.0 if loss.differentiable else column)
        )
        return self

    def _loss(self) -> Loss:
        if self.loss == "smoothed_hinge":
            return smoothed_hinge(check_number(self, "smoothing", above=True))
        losses = {"hinge": hinge, "squared_hinge": squared_hinge}
        if self.loss not in losses:
            raise ValueError(
                f"LinearSVC(loss={self.loss!r}): expected 'squared_hinge', 'hinge' or "
                "'smoothed_hinge'."
            )
        return losses[self.loss]()
