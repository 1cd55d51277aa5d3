"""Problems on scikit-learn's data with its own objective as reference."""

import functools

import jax
import numpy as np
from sklearn import datasets, linear_model

from jdml.models.linear import LinearProblem, Weights, elastic_net, l1, l2, logistic, squared
from jdml.sharding import make_mesh

LAM = 0.01


@functools.cache
def data(name):
    load = {
        "cancer": datasets.load_breast_cancer,
        "digits": datasets.load_digits,
        "diabetes": datasets.load_diabetes,
    }[name]
    x, y = load(return_X_y=True)
    spread = x.std(0)
    x = (x - x.mean(0)) / np.where(spread > 0, spread, 1)
    if name == "diabetes":
        return x, y / y.std()
    return x, np.where(y > np.median(y) if name == "digits" else y > 0, 1.0, -1.0)


def logistic_by(x, y):
    n = len(x)
    return linear_model.LogisticRegression(
        C=1 / (LAM * n), solver="newton-cholesky", tol=1e-10, max_iter=1000
    ).fit(x, y)


def ridge_by(x, y):
    return linear_model.Ridge(alpha=LAM * len(x) / 2, solver="svd").fit(x, y)


def lasso_by(x, y):
    return linear_model.Lasso(alpha=LAM / 2, tol=1e-14, max_iter=100000).fit(x, y)


def elastic_net_by(x, y):
    return linear_model.ElasticNet(alpha=LAM, l1_ratio=0.5, tol=1e-14, max_iter=100000).fit(x, y)


CASES = {
    "logistic": ("cancer", logistic(), l2(LAM), logistic_by),
    "digits": ("digits", logistic(), l2(LAM), logistic_by),
    "ridge": ("diabetes", squared(), l2(LAM), ridge_by),
    "lasso": ("diabetes", squared(), l1(LAM), lasso_by),
    # Σ (y - a)² / 2n + alpha (ratio |w|_1 + (1 - ratio)/2 |w|²), times 2
    "elastic net": ("diabetes", squared(), elastic_net(LAM, LAM), elastic_net_by),
}


def problem_of(case, intercept=True):
    name, loss, penalty, _ = CASES[case]
    return LinearProblem(*data(name), loss, penalty, intercept=intercept)


@functools.cache
def least(case):
    """scikit-learn's objective, with an intercept."""
    name, _, _, fit = CASES[case]
    model = fit(*data(name))
    weights = Weights(np.ravel(model.coef_), np.ravel(model.intercept_)[0])
    return float(problem_of(case).value(weights))


def mesh_of(num, axis="data"):
    return make_mesh({axis: num}, devices=jax.devices()[:num])
