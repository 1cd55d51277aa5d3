"""scikit-learn's own checks of estimators.

Many tiny fits: compiling is what they cost, which filling up to a few sizes keeps low.
"""

import pytest
from sklearn.utils.estimator_checks import (
    check_class_weight_balanced_linear_classifier,
    parametrize_with_checks,
)

from jdml.train.estimators import (
    ElasticNet,
    Lasso,
    LinearRegression,
    LinearSVC,
    LogisticRegression,
    PoissonRegressor,
    Ridge,
)


@parametrize_with_checks([Ridge()])
def test_scikit_learns_checks(estimator, check):
    check(estimator)


@pytest.mark.slow
@parametrize_with_checks(
    [
        LinearRegression(),
        Lasso(alpha=0.1),
        ElasticNet(alpha=0.1),
        LinearSVC(),
        LogisticRegression(),
        PoissonRegressor(),
    ]
)
def test_scikit_learns_checks_of_their_kin(estimator, check):
    check(estimator)


@pytest.mark.parametrize("classifier", [LogisticRegression(), LinearSVC()], ids=str)
def test_class_weights(classifier):
    check_class_weight_balanced_linear_classifier(type(classifier).__name__, classifier)
