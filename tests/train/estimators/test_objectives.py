"""Objectives, in scikit-learn's own units, against its best solvers on its bundled data sets."""

import functools
import warnings

import numpy as np
import pytest
import scipy.sparse
import scipy.special
from sklearn import datasets, linear_model, svm
from sklearn.exceptions import ConvergenceWarning

from jdml.train import estimators


@functools.cache
def data(name, scaled=True):
    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    spread = x.std(0)
    return ((x - x.mean(0)) / np.where(spread > 0, spread, 1) if scaled else x), y


def half_squares(model, x, y, weight):
    a = x @ model.coef_ + model.intercept_
    return weight @ (y - a) ** 2 / 2 / weight.sum()


def ridge(model, x, y, weight):
    total = weight.sum()
    return half_squares(model, x, y, weight) * 2 * total + model.alpha * model.coef_ @ model.coef_


def enet(model, x, y, weight):
    w, ratio = model.coef_, getattr(model, "l1_ratio", 1.0)
    return half_squares(model, x, y, weight) + model.alpha * (
        ratio * np.abs(w).sum() + (1 - ratio) / 2 * w @ w
    )


def counts(model, x, y, weight):
    a = x @ model.coef_ + model.intercept_
    loss = weight @ (np.exp(a) - y * a) / weight.sum()
    return loss + model.alpha / 2 * model.coef_ @ model.coef_


def entropy(model, x, y, weight):
    a = x @ model.coef_.T + model.intercept_
    if a.shape[1] == 1:
        a = np.hstack([-a / 2, a / 2])
    numbers = np.searchsorted(model.classes_, y)
    own = np.take_along_axis(a, numbers[:, None], 1)[:, 0]
    w = model.coef_
    penalty = model.l1_ratio * np.abs(w).sum() + (1 - model.l1_ratio) / 2 * (w * w).sum()
    return weight @ (scipy.special.logsumexp(a, axis=1) - own) + penalty / model.C


def margins(model, x, y, weight):
    """Of all classes together; b is penalised for the hinge, as liblinear has it."""
    a = x @ model.coef_.T + model.intercept_
    positive = model.classes_[1:] if len(model.classes_) == 2 else model.classes_
    short = np.maximum(0, 1 - np.where(y[:, None] == positive, 1, -1) * a)
    w = model.coef_
    if model.loss == "hinge":
        w = np.column_stack([w, model.intercept_])
    else:
        short = short**2
    size = np.abs(w).sum() if model.penalty == "l1" else (w * w).sum() / 2
    return model.C * (weight @ short).sum() + size


# data set, scaled, objective, ours, theirs; of six seeds liblinear's hinge comes within 1e-5 of the
# minimum with two, 4 being one of them
CASES = {
    "least squares": ("diabetes", False, half_squares, "LinearRegression", {}, {}),
    "ridge": ("diabetes", False, ridge, "Ridge", {"alpha": 3.0}, {"solver": "svd"}),
    "lasso": ("diabetes", True, enet, "Lasso", {"alpha": 0.5}, {"tol": 1e-14}),
    "elastic net": ("wine", True, enet, "ElasticNet", {"alpha": 0.05}, {"tol": 1e-14}),
    "poisson": (
        "diabetes", True, counts, "PoissonRegressor", {"alpha": 0.1},
        {"solver": "newton-cholesky", "tol": 1e-10},
    ),
    "logistic": (
        "breast_cancer", False, entropy, "LogisticRegression", {},
        {"solver": "newton-cholesky", "tol": 1e-10},
    ),
    "logistic l1": (
        "breast_cancer", True, entropy, "LogisticRegression",
        {"l1_ratio": 1.0, "C": 0.1, "fit_intercept": False},
        {"solver": "liblinear", "tol": 1e-10, "max_iter": 100000},
    ),
    "multinomial": (
        "digits", True, entropy, "LogisticRegression", {"C": 0.05},
        {"solver": "newton-cg", "tol": 1e-10},
    ),
    "multinomial elastic net": (
        "wine", True, entropy, "LogisticRegression", {"l1_ratio": 0.5},
        {"solver": "saga", "tol": 1e-12, "max_iter": 100000},
    ),
    "squared hinge": (
        "digits", True, margins, "LinearSVC", {"C": 0.05, "fit_intercept": False},
        {"dual": False, "tol": 1e-10, "max_iter": 100000},
    ),
    "squared hinge l1": (
        "breast_cancer", True, margins, "LinearSVC",
        {"penalty": "l1", "C": 0.1, "fit_intercept": False},
        {"dual": False, "tol": 1e-10, "max_iter": 100000},
    ),
    "hinge": (
        "wine", True, margins, "LinearSVC", {"loss": "hinge", "C": 0.1},
        {"dual": True, "tol": 1e-12, "max_iter": 1000000, "random_state": 4},
    ),
}  # fmt: skip


def weights(y, kind):
    if kind == "equal":
        return np.ones(len(y))
    return np.random.default_rng(0).integers(0, 4, len(y)).astype(float)


@functools.cache
def reference(case, kind):
    name, scaled, objective, kind_of_model, common, best = CASES[case]
    x, y = data(name, scaled)
    weight = weights(y, kind)
    theirs = getattr(svm if kind_of_model == "LinearSVC" else linear_model, kind_of_model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = theirs(**common, **best)
        if hasattr(found, "max_iter") and "max_iter" not in best:
            found.set_params(max_iter=100000)
        found.fit(x, y, sample_weight=weight)
    return objective(found, x, y, weight)


def objectives(case, dtype, kind="equal", **more):
    """Ours and theirs."""
    name, scaled, objective, kind_of_model, common, _ = CASES[case]
    x, y = data(name, scaled)
    weight = weights(y, kind)
    ours = getattr(estimators, kind_of_model)(**common, **more)
    ours.fit(x.astype(dtype), y, sample_weight=None if kind == "equal" else weight)
    assert ours.coef_.dtype == dtype
    return objective(ours, x, y, weight), reference(case, kind)


FURTHER = ("multinomial", "squared hinge", "logistic l1", "elastic net")


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow) if c in FURTHER else c for c in CASES]
)
def test_objective_in_f64(case):
    # The gap of a dual method is held to the objective at 0, of which the minimum is a part.
    ours, theirs = objectives(case, np.float64, **({"tol": 1e-10} if case == "hinge" else {}))
    assert ours == pytest.approx(theirs, rel=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_objective_in_f32(case):
    ours, theirs = objectives(case, np.float32)
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize(
    "case", ["least squares", "ridge", "lasso", "poisson", "logistic", "hinge"]
)
def test_objective_with_weights(case):
    ours, theirs = objectives(
        case, np.float64, "drawn", **({"tol": 1e-10} if case == "hinge" else {})
    )
    assert ours == pytest.approx(theirs, rel=1e-8)
