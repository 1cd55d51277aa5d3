"""Rates of the methods of first order, on problems whose minimum is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdml.models.linear import (
    LinearProblem,
    box,
    l1,
    l1_ball,
    l2,
    logistic,
    none,
    poisson,
    simplex,
    squared,
)
from jdml.optimize import (
    accelerated,
    frank_wolfe,
    gradient_descent,
    projected,
    proximal,
    solve,
)

N, D = 60, 12
RANDOM = np.random.default_rng(0)
# Curvatures of (1/n) X'X from 1 down to 1e-3, so that L = 2 and mu = 2e-3 for squared loss.
BASE = np.linalg.qr(RANDOM.standard_normal((N, D)))[0]
TURN = np.linalg.qr(RANDOM.standard_normal((D, D)))[0]
CURVATURES = np.geomspace(1, 1e-3, D)
X = np.sqrt(N) * BASE * np.sqrt(CURVATURES) @ TURN
Y = X @ RANDOM.standard_normal(D) + 0.3 * RANDOM.standard_normal(N)
LARGEST, SMALLEST = 2 * CURVATURES[0], 2 * CURVATURES[-1]
BEST = np.linalg.solve(X.T @ X, X.T @ Y)
LEAST = np.mean((X @ BEST - Y) ** 2)
FAR = BEST @ BEST  # |w_0 - w*|^2


@pytest.fixture(scope="module")
def least_squares():
    with jax.enable_x64(True):
        yield LinearProblem(X, Y, squared(), none())


def errors(solution):
    return solution.history.values - LEAST


def test_gradient_descent_is_linear_and_no_slower_than_its_bounds(least_squares):
    found = solve(least_squares, gradient_descent(1 / LARGEST), tol=0, max_steps=4000)
    k, error = found.history.steps, errors(found)
    assert k.tolist() == list(range(4001))
    assert (error <= error[0] * (1 - SMALLEST / LARGEST) ** k * (1 + 1e-9)).all()
    assert (error[1:] <= LARGEST * FAR / (2 * k[1:])).all()
    # Linear at the rate of the least curvature: (1 - mu/L)^2 in P, when that is all that is left.
    late = error[-1] / error[-101]
    assert late == pytest.approx((1 - SMALLEST / LARGEST) ** 200, rel=0.02)


def test_accelerated_is_quadratic_in_steps(least_squares):
    found = solve(least_squares, accelerated(1 / LARGEST, restart=False), tol=0, max_steps=400)
    k, error = found.history.steps, errors(found)
    assert (error <= 2 * LARGEST * FAR / (k + 1) ** 2).all()
    slow = solve(least_squares, gradient_descent(1 / LARGEST), tol=0, max_steps=400)
    assert error[100] < errors(slow)[400]  # four times as many, and more, without momentum


def test_restarts_make_it_linear(least_squares):
    found = solve(least_squares, accelerated(1 / LARGEST), tol=1e-12, max_steps=3000)
    assert found.converged
    # Steps go with the root of the condition number, 31.6; 1e-12 of the start are 28 nats.
    assert found.num_steps < 31.6 * 28
    assert abs(errors(found)[-1]) < 1e-14


@pytest.mark.parametrize("method", [gradient_descent(), accelerated(), proximal()], ids=str)
def test_backtracking_needs_no_constant(least_squares, method):
    found = solve(least_squares, method, tol=1e-10, max_steps=20000)
    assert found.converged
    np.testing.assert_allclose(found.params.w, BEST, atol=1e-6)
    assert LARGEST * 0.5 < float(found.state.bound) <= LARGEST * 1.3 * (1 + 1e-6)


def test_a_loss_whose_curvature_has_no_bound():
    x = 0.5 * RANDOM.standard_normal((80, 3))
    y = RANDOM.poisson(np.exp(x @ [1.0, -0.5, 0.2] + 0.7))
    problem = LinearProblem(x, y, poisson(), l2(0.01), intercept=True)
    found = solve(problem, accelerated(), tol=1e-9, max_steps=2000)
    assert found.converged
    _, gradient = problem.value_and_gradient(found.params)
    assert max(float(jnp.abs(leaf).max()) for leaf in gradient) < 1e-8


def test_lasso_satisfies_its_conditions():
    problem = LinearProblem(X, Y, squared(), l1(0.3), intercept=True)
    largest = 2 * np.linalg.norm(np.column_stack([X, np.ones(N)]), 2) ** 2 / N
    for method in (proximal(), proximal(momentum=False)):
        found = solve(problem, method, tol=1e-10, max_steps=20000)
        assert found.converged
        # ISTA's bound, with L at most 1.3 times what it need be; restarted FISTA is far below it.
        k, far = found.history.steps[1:], sum(float(jnp.sum(p**2)) for p in found.params)
        error = found.history.values[1:] - found.value
        assert (error <= 1.3 * largest * far / (2 * k) + 1e-14).all()
        if method.momentum:  # the restarts make it linear, as in the test above
            assert found.num_steps < 31.6 * 28
        _, gradient = problem.loss_and_gradient(found.params)
        w = np.asarray(found.params.w)
        assert 0 < (w == 0).sum() < D
        np.testing.assert_allclose(gradient.w[w != 0], -0.3 * np.sign(w[w != 0]), atol=1e-8)
        assert (np.abs(gradient.w[w == 0]) < 0.3).all()
        assert abs(float(gradient.b)) < 1e-8


@pytest.mark.parametrize("constraint", [box(-0.4, 0.4), l1_ball(2.0), simplex(1.5)], ids=str)
def test_constrained_methods_agree(constraint):
    problem = LinearProblem(X, Y, squared(), constraint)
    by_projection = solve(problem, projected(), tol=1e-9, max_steps=20000)
    with_momentum = solve(problem, projected(momentum=True), tol=1e-9, max_steps=5000)
    assert by_projection.converged
    k, error = by_projection.history.steps, by_projection.history.values - by_projection.value
    start = np.asarray(constraint.project(jnp.zeros(D)))
    far = np.sum((start - by_projection.params.w) ** 2)
    assert (error[1:] <= 1.3 * LARGEST * far / (2 * k[1:]) + 1e-12).all()
    assert with_momentum.num_steps < by_projection.num_steps
    assert with_momentum.value == pytest.approx(by_projection.value, rel=1e-9)
    by_corners = solve(problem, frank_wolfe(), tol=1e-3, max_steps=20000)
    assert by_corners.converged
    # The gap certifies: no further from the minimum than it says.
    assert -1e-9 <= by_corners.value - by_projection.value <= by_corners.certificate + 1e-12
    np.testing.assert_allclose(
        constraint.project(by_corners.params.w), by_corners.params.w, atol=1e-12
    )


def test_frank_wolfe_is_sublinear_and_sparse():
    radius = 2.0
    problem = LinearProblem(X, Y, squared(), l1_ball(radius))
    best = solve(problem, projected(momentum=True), tol=1e-10, max_steps=20000).value
    found = solve(problem, frank_wolfe(line_search=False), tol=0, max_steps=300)
    k, error = found.history.steps[1:], found.history.values[1:] - best
    assert (error <= 2 * LARGEST * (2 * radius) ** 2 / (k + 2)).all()
    assert (error >= -1e-12).all()
    assert (found.history.certificates[1:] >= error - 1e-12).all()
    few = solve(problem, frank_wolfe(), tol=0, max_steps=3)
    assert (np.asarray(few.params.w) != 0).sum() <= 3


def test_first_order_on_logistic_regression():
    y = np.where(Y > 0, 1, -1)
    problem = LinearProblem(X, y, logistic(), l2(0.05), intercept=True)
    values = [
        solve(problem, method, tol=1e-9, max_steps=5000).value
        for method in (gradient_descent(), accelerated(), proximal())
    ]
    np.testing.assert_allclose(values, values[0], rtol=1e-12)


def test_refused():
    for make in (gradient_descent, accelerated, proximal, projected):
        with pytest.raises(ValueError, match="step_size=-1"):
            make(-1.0)
