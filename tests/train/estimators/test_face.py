"""What the estimators do besides solving: solvers by name, weights, sparse rows, refusals."""

import subprocess
import sys

import jax
import numpy as np
import pytest
import scipy.sparse
from sklearn.datasets import load_diabetes, load_wine
from sklearn.exceptions import ConvergenceWarning

from jdml.optimize import lbfgs
from jdml.train.estimators import (
    ElasticNet,
    Lasso,
    LinearRegression,
    LinearSVC,
    LogisticRegression,
    PoissonRegressor,
    Ridge,
)


@pytest.fixture(scope="module")
def wine():
    x, y = load_wine(return_X_y=True)
    return (x - x.mean(0)) / x.std(0), np.array(["red", "rose", "white"])[y]


@pytest.fixture(scope="module")
def two(wine):
    x, y = wine
    return x[y != "rose"], y[y != "rose"]


@pytest.mark.parametrize(
    "solver", ["newton_cg", "lbfgs", pytest.param(lbfgs(memory=5), marks=pytest.mark.slow)], ids=str
)
def test_solvers_agree(wine, solver):
    x, y = wine
    usual = LogisticRegression().fit(x, y)
    other = LogisticRegression(solver=solver, tol=1e-10).fit(x, y)
    np.testing.assert_allclose(other.coef_, usual.coef_, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(other.intercept_, usual.intercept_, rtol=1e-6, atol=1e-7)
    assert other.certificate_ < 1e-8
    assert other.n_iter_ > 0


@pytest.mark.parametrize("solver", ["sdca", "dual_newton"])
def test_dual_methods_fit_an_intercept_of_centred_columns(solver):
    x, y = load_diabetes(return_X_y=True)
    usual = Ridge(0.1).fit(x, y)
    dual = Ridge(0.1, solver=solver, tol=1e-13).fit(x, y)
    np.testing.assert_allclose(dual.coef_, usual.coef_, rtol=1e-4)
    assert dual.intercept_ == pytest.approx(usual.intercept_)


@pytest.mark.parametrize(
    "estimator",
    [
        pytest.param(Lasso(0.1), marks=pytest.mark.slow),
        LogisticRegression(),
        pytest.param(LinearSVC(loss="hinge", tol=1e-12), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_sparse_rows_give_the_same(two, estimator):
    x, y = two
    x = np.where(np.abs(x) > 1, x, 0)
    y = y if hasattr(estimator, "class_weight") else (y == "red") * 1.0
    dense = estimator.fit(x, y)
    margins = dense.coef_, np.atleast_1d(dense.intercept_)
    sparse = estimator.fit(scipy.sparse.csc_array(x), y)
    np.testing.assert_allclose(sparse.coef_, margins[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(np.atleast_1d(sparse.intercept_), margins[1], rtol=1e-4, atol=1e-6)


def test_the_sessions_precision_is_left_alone(two):
    x, y = two
    assert not jax.config.jax_enable_x64
    assert LogisticRegression().fit(x, y).coef_.dtype == np.float64
    single = LogisticRegression().fit(x.astype(np.float32), y)
    assert single.coef_.dtype == single.predict_proba(x[:3].astype(np.float32)).dtype == np.float32
    assert not jax.config.jax_enable_x64


def test_least_squares_of_dependent_columns_has_the_least_weights():
    x, y = load_diabetes(return_X_y=True)
    x, y = np.hstack([x, x[:, :2]])[:60], y[:60]
    found = LinearRegression(tol=1e-12).fit(x, y)
    centred = x - x.mean(0)
    least = np.linalg.lstsq(centred, y - y.mean(), rcond=1e-10)[0]
    np.testing.assert_allclose(found.coef_, least, rtol=1e-6)
    with pytest.raises(ValueError, match="rank 10 of 12"):
        LinearRegression(solver="newton_cholesky").fit(x, y)


def test_a_constant_column_weighs_nothing():
    x, y = load_diabetes(return_X_y=True)
    x = np.column_stack([x, np.full(len(x), 0.1)])
    assert LinearRegression().fit(x, y).coef_[-1] == 0


def test_probabilities_and_classes(wine):
    x, y = wine
    model = LogisticRegression().fit(x, y)
    assert model.classes_.tolist() == ["red", "rose", "white"]
    assert model.coef_.shape == (3, 13)
    np.testing.assert_allclose(model.predict_proba(x).sum(axis=1), 1)
    np.testing.assert_allclose(np.exp(model.predict_log_proba(x)), model.predict_proba(x))
    assert model.score(x, y) > 0.98
    assert model.decision_function(x).shape == (178, 3)


def test_class_weights_are_sample_weights(wine):
    x, y = wine
    weight = np.where(y == "red", 3.0, 1.0)
    named = LogisticRegression(class_weight={"red": 3, "rose": 1, "white": 1}).fit(x, y)
    given = LogisticRegression().fit(x, y, sample_weight=weight)
    np.testing.assert_allclose(named.coef_, given.coef_)
    _, number, counts = np.unique(y, return_inverse=True, return_counts=True)
    balanced = LinearSVC(class_weight="balanced").fit(x, y)
    given = LinearSVC().fit(x, y, sample_weight=(len(y) / 3 / counts)[number])
    np.testing.assert_allclose(balanced.coef_, given.coef_, rtol=1e-6)


def test_penalties_of_two_spellings(two):
    x, y = two
    for name, ratio in (("l1", 1.0), ("l2", 0.0)):
        by_name = LogisticRegression(name, C=0.1).fit(x, y)
        by_ratio = LogisticRegression(l1_ratio=ratio, C=0.1).fit(x, y)
        np.testing.assert_array_equal(by_name.coef_, by_ratio.coef_)
    assert (LogisticRegression("l1", C=0.1).fit(x, y).coef_ == 0).any()


def test_the_smoothed_hinge_nears_the_hinge(two):
    x, y = two
    hinge = LinearSVC(loss="hinge", fit_intercept=False, tol=1e-12).fit(x, y)
    near = LinearSVC(loss="smoothed_hinge", smoothing=1e-3, fit_intercept=False).fit(x, y)
    np.testing.assert_allclose(near.coef_, hinge.coef_, atol=2e-3)


def test_steps_that_run_out_are_told(two):
    with pytest.warns(ConvergenceWarning, match=r"lbfgs ended after 1 steps.*Raise max_iter"):
        assert LogisticRegression(solver="lbfgs", max_iter=1).fit(*two).n_iter_ == 1


def numbers(y):
    return (y == "red") * 1.0


@pytest.mark.parametrize(
    ("estimator", "labels", "message"),
    [
        (Ridge(-1), numbers, r"Ridge\(alpha=-1\): expected a number >= 0"),
        (Lasso("much"), numbers, r"alpha='much'\): expected a number"),
        (ElasticNet(l1_ratio=2), numbers, r"l1_ratio=2\): expected a number >= 0 and <= 1"),
        (LogisticRegression(C=0), None, r"C=0\): expected a number > 0, or infinity"),
        (LogisticRegression(penalty="l3"), None, "expected 'elasticnet', 'l2', 'l1' or None"),
        (LogisticRegression(penalty="l2", l1_ratio=0.5), None, "contradict each other"),
        (LogisticRegression(max_iter=0), None, r"max_iter=0\): expected a whole number >= 1"),
        (LogisticRegression(tol=-1), None, r"tol=-1\): expected a number >= 0"),
        (LogisticRegression(class_weight={"red": -1}), None, "expected numbers >= 0"),
        (LogisticRegression(), np.full_like, "one class"),
        (LinearSVC(loss="huber"), None, "expected 'squared_hinge', 'hinge'"),
        (LinearSVC("l1", "hinge"), None, "no method here does both"),
        (LinearSVC(loss="smoothed_hinge", smoothing=0), None, r"smoothing=0\): expected"),
        (PoissonRegressor(), lambda y: numbers(y) - 1, "expected counts, >= 0"),
        (LogisticRegression(solver="liblinear"), None, "or the name of one: accelerated, coord"),
        (
            LogisticRegression(solver="sdca"), None,
            r"sdca cannot do a logistic loss .* intercept .* Methods that can: .*newton_cg",
        ),
        (LinearSVC(loss="hinge", solver="lbfgs"), None, "no gradient .* can: .*sdca"),
        (Lasso(solver="newton_cg"), numbers, "no gradient everywhere. .* can: .*proximal"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(two, estimator, labels, message):
    x, y = two
    if labels is np.full_like:
        y = np.full_like(y, "red")
    elif labels is not None:
        y = labels(y)
    with pytest.raises(ValueError, match=message):
        estimator.fit(x, y)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_rows_without_a_number_are_named(two, sparse):
    x = two[0].copy()
    x[3, 0], x[50] = np.nan, np.inf
    x = scipy.sparse.csr_array(x) if sparse else x
    with pytest.raises(ValueError, match="NaN or infinity in 2 rows: 3, 50"):
        LogisticRegression().fit(x, two[1])


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (-np.ones(107), "is not a number >= 0"),
        (np.ones(3), "expected .107,"),
        (np.zeros(107), "zero"),
    ],
)
def test_bad_weights_are_refused(two, weight, message):
    with pytest.raises(ValueError, match=message):
        LogisticRegression().fit(*two, sample_weight=weight)


def test_without_scikit_learn_it_says_what_to_install():
    script = "import sys; sys.modules['sklearn'] = None; import jdml.train.estimators"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert "ImportError" in done.stderr
    assert "pip install 'jdml[estimators]'" in done.stderr
