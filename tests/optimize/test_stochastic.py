"""Rates of stochastic methods, on problems whose minimum is known; what they refuse."""

import jax
import numpy as np
import optax
import pytest
import scipy.optimize
import scipy.sparse

from jdml.models.linear import (
    LinearProblem,
    Weights,
    box,
    elastic_net,
    hinge,
    l1,
    l1_ball,
    l2,
    logistic,
    multinomial,
    none,
    poisson,
    squared,
)
from jdml.optimize import (
    coordinate_descent,
    lbfgs,
    proximal,
    quasi_newton,
    saga,
    sgd,
    solve,
    svrg,
)

N, D = 200, 5
RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((N, D))
Y = X @ RANDOM.standard_normal(D) + RANDOM.standard_normal(N)
SIGNS = np.where(Y + 0.3 > 0, 1, -1)
STRENGTH = 0.5

# P = mean (x w - y)^2 + STRENGTH/2 |w|^2
HESSIAN = 2 * X.T @ X / N + STRENGTH * np.eye(D)
BEST = np.linalg.solve(HESSIAN, 2 * X.T @ Y / N)
LEAST = np.mean((X @ BEST - Y) ** 2) + STRENGTH / 2 * BEST @ BEST
MU = np.linalg.eigvalsh(HESSIAN)[0]
L_MAX = 2 * (X**2).sum(1).max()  # of a sample's loss; the penalty is in the prox


@pytest.fixture(scope="module")
def ridge():
    with jax.enable_x64(True):
        yield LinearProblem(X, Y, squared(), l2(STRENGTH))


def errors(solution):
    return solution.history.values - LEAST


def test_svrg_is_linear_at_its_bound():
    n = 2000
    x = RANDOM.standard_normal((n, 3))
    y = x.sum(1) + RANDOM.standard_normal(n)
    problem = LinearProblem(x, y, squared(), l2(STRENGTH))
    hessian = 2 * x.T @ x / n + STRENGTH * np.eye(3)
    best = float(problem.value(Weights(np.linalg.solve(hessian, 2 * x.T @ y / n))))
    largest, mu, draws = 2 * (x**2).sum(1).max(), np.linalg.eigvalsh(hessian)[0], 2 * n
    bound = 1 / (mu * (0.1 / largest) * 0.6 * draws) + 0.4 * (draws + 1) / (0.6 * draws)
    assert bound < 0.8
    found = solve(problem, svrg(0.1 / largest), tol=0, max_steps=6)
    error = found.history.values - best
    assert (error <= error[0] * bound**found.history.steps + 1e-14).all()
    assert error[-1] < 1e-10


def test_saga_is_linear_at_its_bound(ridge):
    found = solve(ridge, saga(1 / (3 * L_MAX)), tol=0, max_steps=120)
    shrinks = 1 - min(1 / (4 * N), MU / (3 * L_MAX))
    k = found.history.steps * N
    # E |w - w*|^2 <= shrinks^k (|w_0 - w*|^2 + 2n/3L (P_0 - P*)); P - P* <= L/2 |w - w*|^2.
    top = np.linalg.eigvalsh(HESSIAN)[-1]
    bound = top / 2 * shrinks**k * (BEST @ BEST + 2 * N / (3 * L_MAX) * errors(found)[0])
    assert (errors(found) <= bound + 1e-14).all()
    assert errors(found)[-1] < 1e-12


def test_coordinate_descent_is_linear_at_its_bound(ridge):
    runs = [
        solve(ridge, coordinate_descent(seed), tol=0, max_steps=30, check_every=1)
        for seed in range(20)
    ]
    scale = 2 * (X**2).mean(0) + STRENGTH
    mu = np.linalg.eigvalsh(HESSIAN / np.sqrt(np.outer(scale, scale)))[0]
    k = runs[0].history.steps * D
    # The bound is on the mean over draws, in which a few that leave a coordinate out weigh most;
    # the geometric mean is no larger, and 20 draws tell it well.
    error = np.exp(np.mean([np.log(np.maximum(errors(run), 1e-16)) for run in runs], axis=0))
    assert (error <= error[0] * (1 - mu / D) ** k + 1e-14).all()
    assert error[-1] < 1e-10
    assert errors(runs[0])[3] != errors(runs[1])[3]  # each seed its draws


def test_coordinate_descent_takes_the_same_steps_by_columns_and_on_a_gram_matrix():
    loss, penalty, intercept, _ = CASES["squared, elastic net, sparse"]
    x, weights = np.where(abs(X) > 0.7, X, 0), 0.5 + RANDOM.random(N)
    found = [
        solve(
            LinearProblem(rows, Y, loss, penalty, weights, intercept), coordinate_descent(),
            tol=0, max_steps=3,
        )
        for rows in (scipy.sparse.csr_array(x), x)
    ]  # fmt: skip
    assert [run.state.quadratic is None for run in found] == [True, False]
    np.testing.assert_allclose(found[0].params.w, found[1].params.w, rtol=1e-12)
    assert float(found[0].params.b) == pytest.approx(float(found[1].params.b), rel=1e-12)


def test_coordinate_descent_on_many_sparse_rows():
    """XLA makes other fusions of thousands of rows, which a single kernel may not contain."""
    x = scipy.sparse.random_array((20_000, 10), density=0.2, rng=np.random.default_rng(0))
    y = 1 + x @ np.ones(10)
    problem = LinearProblem(x, y, squared(), l2(0.0), intercept=True)
    found = solve(problem, coordinate_descent(), tol=1e-5, max_steps=200)
    np.testing.assert_allclose(found.params.w, np.ones(10), atol=1e-4)
    assert float(found.params.b) == pytest.approx(1, abs=1e-4)


def least_hinge():
    """The SVM's minimum, from its dual: a quadratic in ``b = yα`` over a box."""
    signed = X * SIGNS[:, None]

    def negative_dual(b):
        w = signed.T @ b / (STRENGTH * N)
        return STRENGTH / 2 * w @ w - b.mean(), signed @ w / N - 1 / N

    found = scipy.optimize.minimize(
        negative_dual, np.full(N, 0.5), jac=True, bounds=[(0, 1)] * N,
        options={"ftol": 1e-15, "gtol": 1e-12, "maxiter": 5000},
    )  # fmt: skip
    return -found.fun


def test_sgd_is_sublinear_at_its_bound():
    problem = LinearProblem(X, SIGNS, hinge(), l2(STRENGTH))
    # Pegasos: |subgradients| <= max |x| + STRENGTH |w|, |w| <= max |x| / STRENGTH.
    squares = (2 * np.linalg.norm(X, axis=1).max()) ** 2
    chain = optax.sgd(lambda t: 2 / (STRENGTH * (t + 2)))
    runs = [
        solve(problem, sgd(chain, average=True, seed=seed), tol=0, max_steps=20 * N)
        for seed in range(8)
    ]
    t = runs[0].history.steps[1:]
    error = np.mean([run.history.values[1:] for run in runs], axis=0) - least_hinge()
    assert (error > 0).all()
    assert (error <= 2 * squares / (STRENGTH * (t + 1))).all()
    assert -1.3 < np.polyfit(np.log(t), np.log(error), 1)[0] < -0.7
    assert not runs[0].converged  # a subgradient says nothing at a corner


def test_stochastic_quasi_newton_is_sublinear_and_follows_curvature():
    stretched = X * np.geomspace(1, 0.03, D)  # condition number about 1,000
    problem = LinearProblem(stretched, Y, squared(), l2(1e-3))
    best = solve(problem, lbfgs(), tol=1e-12).value
    found = solve(problem, quasi_newton(seed=1, hessian_batch=128), tol=0, max_steps=2000)
    error = found.history.values - best
    updates = found.history.steps * 10
    late = updates > 1000
    assert (error[late] <= 20 * error[0] / updates[late]).all()
    plain = solve(
        problem,
        sgd(optax.sgd(lambda k: 0.3 / (1 + k / 100)), 32),
        tol=0,
        max_steps=20000,
        check_every=20000,
    )
    assert error[-1] < 0.2 * (plain.value - best)


CASES = {
    "logistic, l2, intercept": (logistic(), l2(0.05), True, False),
    "squared, elastic net, sparse": (squared(), elastic_net(0.1, 0.1), True, True),
    "multinomial": (multinomial(3), l2(0.05), True, False),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "method",
    [svrg(batch_size=8), saga(batch_size=8), coordinate_descent()],
    ids=lambda method: method.name,
)
def test_agree_with_deterministic_methods(name, method):
    loss, penalty, intercept, sparse = CASES[name]
    y = {"logistic": SIGNS, "squared": Y, "multinomial": np.digitize(Y, [-1, 1])}[loss.name]
    x = scipy.sparse.csr_array(np.where(abs(X) > 0.7, X, 0)) if sparse else X
    weights = 0.5 + RANDOM.random(N)
    problem = LinearProblem(x, y, loss, penalty, weights, intercept)
    if loss.num_outputs and method.name == "coordinate_descent":
        with pytest.raises(ValueError, match=r"one margin a sample.*saga, .*svrg"):
            solve(problem, method)
        return
    best = solve(problem, proximal(), tol=1e-9, max_steps=5000)
    found = solve(problem, method, tol=1e-8, max_steps=500)
    assert found.converged
    assert found.value == pytest.approx(best.value, rel=1e-12)


def test_sgd_under_a_constraint_stays_within():
    problem = LinearProblem(X, Y, squared(), l1_ball(0.5))
    found = solve(problem, sgd(optax.sgd(lambda t: 0.2 / (1 + t / 20)), 16), tol=0, max_steps=500)
    assert np.abs(found.params.w).sum() <= 0.5 + 1e-12
    best = solve(problem, proximal(), tol=1e-9).value
    assert found.value == pytest.approx(best, rel=0.01)


def test_going_on_from_a_state_is_as_going_on(ridge):
    method = saga(batch_size=4, seed=3)
    whole = solve(ridge, method, tol=0, max_steps=4)
    half = solve(ridge, method, tol=0, max_steps=2)
    rest = solve(ridge, method, tol=0, max_steps=2, state=half.state)
    np.testing.assert_array_equal(rest.params.w, whole.params.w)
    assert rest.value == whole.value


@pytest.mark.parametrize(
    ("problem", "method", "message"),
    [
        ((SIGNS, hinge(), l2(1.0)), svrg(), "no gradient at its corner.* sgd"),
        ((abs(SIGNS), poisson(), l2(1.0)), saga(), "has no bound.*lbfgs.*newton_cg.*sgd"),
        ((Y, squared(), l1(1.0)), sgd(optax.sgd(0.1)), "no gradient.*proximal, saga, svrg"),
        ((Y, squared(), l1(1.0)), quasi_newton(), "penalty l1 has no gradient"),
        ((Y, squared(), l1_ball(1.0)), coordinate_descent(), "no sum over coordinates"),
        ((Y, squared(), none()), svrg(batch_size=N + 1), "has 200 samples"),
        ((Y, squared(), box(0, 1)), sgd(optax.sgd(0.1), 201), "has 200 samples"),
    ],
)
def test_refused(problem, method, message):
    with pytest.raises(ValueError, match=message):
        solve(LinearProblem(X, *problem), method)


def test_arguments_refused():
    for make in (svrg, saga, quasi_newton):
        with pytest.raises(ValueError, match="batch_size=0"):
            make(batch_size=0)
    with pytest.raises(ValueError, match="batch_size=0"):
        sgd(optax.sgd(0.1), 0)
    with pytest.raises(ValueError, match="scale=0"):
        quasi_newton(scale=0.0)
