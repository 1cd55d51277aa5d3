"""What linear classifiers share: classes, their weights, and decisions."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.base import ClassifierMixin
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets

from jdml.train.estimators.base import Fitted, LinearEstimator


class LinearClassifier(ClassifierMixin, LinearEstimator):
    class_weight: Mapping[Any, float] | str | None
    classes_: np.ndarray

    def _checked_classes(self, X: Any, y: Any, sample_weight: Any) -> tuple[Any, Any, Any]:
        """X, the number of each sample's class, and weights with those of the classes in them."""
        X, y, weight = self._checked(X, y, sample_weight)
        check_classification_targets(y)
        self.classes_, numbers = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(
                f"{type(self).__name__}: y has one class, {self.classes_[0]!r}; expected at least "
                "two classes."
            )
        if self.class_weight is None:
            return X, numbers, weight
        if isinstance(self.class_weight, str) and self.class_weight == "balanced":
            # Each class as heavy as any other, by the weights of its samples.
            heavy = np.bincount(numbers, weight)
            factors = weight.sum() / (len(heavy) * np.where(heavy > 0, heavy, 1))
        else:
            factors = compute_class_weight(self.class_weight, classes=self.classes_, y=y)
            if not (np.isfinite(factors) & (factors >= 0)).all():
                raise ValueError(
                    f"{type(self).__name__}(class_weight={self.class_weight!r}): expected numbers "
                    ">= 0."
                )
        weight = weight * factors[numbers]
        if not weight.any():
            raise ValueError(
                f"{type(self).__name__}(class_weight={self.class_weight!r}) leaves no sample a "
                "weight above zero."
            )
        return X, numbers, weight

    def _keep(self, found: list[Fitted]) -> None:
        """``coef_ [1 or classes, d]`` and the rest; one of ``found`` may have several outputs."""
        self.coef_ = np.vstack([each.w.T for each in found])
        self.intercept_ = np.hstack([each.b for each in found]).astype(self.coef_.dtype)
        self.n_iter_ = max(each.num_steps for each in found)
        self.certificate_ = max(each.certificate for each in found)

    def decision_function(self, X: Any) -> np.ndarray:
        """Margins: ``[n]``, above 0 for ``classes_[1]``, or ``[n, classes]``."""
        margins = self._margins(X)
        return margins[:, 0] if margins.shape[1] == 1 else margins

    def predict(self, X: Any) -> np.ndarray:
        """The class of the largest margin, ``[n]``."""
        margins = self.decision_function(X)
        numbers = (margins > 0).astype(int) if margins.ndim == 1 else margins.argmax(axis=1)
        return self.classes_[numbers]
