"""Newton's rate, Hessians, L-BFGS; what is refused."""

import jax
import numpy as np
import pytest
import scipy.optimize
import scipy.sparse
from jax.flatten_util import ravel_pytree

from jdml.models.linear import (
    LinearProblem,
    hinge,
    l1,
    l2,
    logistic,
    multinomial,
    none,
    poisson,
    smoothed_hinge,
    squared,
    squared_hinge,
)
from jdml.optimize import lbfgs, newton_cg, newton_cholesky, solve

N, D = 80, 6
RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((N, D)) * np.geomspace(1, 0.1, D)
SCORES = X @ RANDOM.standard_normal(D) * 2 + 0.5 * RANDOM.standard_normal(N)
SIGNS = np.where(SCORES > 0.3, 1, -1)
WEIGHTS = RANDOM.random(N) + 0.1


@pytest.fixture(scope="module")
def logistic_problem():
    with jax.enable_x64(True):
        yield LinearProblem(X, SIGNS, logistic(), l2(0.01), WEIGHTS, intercept=True)


@pytest.fixture(scope="module")
def best(logistic_problem):
    """By SciPy, to rounding."""
    problem = logistic_problem
    flat, unravel = ravel_pytree(problem.init())
    objective = jax.jit(lambda p: jax.value_and_grad(lambda q: problem.value(unravel(q)))(p))
    found = scipy.optimize.minimize(
        lambda p: [np.asarray(v, np.float64) for v in objective(p)],
        flat,
        jac=True,
        method="BFGS",
        options={"gtol": 1e-13},
    )
    return float(found.fun)


@pytest.mark.parametrize("method", [newton_cholesky(), newton_cg(), lbfgs()], ids=lambda m: m.name)
def test_reaches_the_minimum(logistic_problem, best, method):
    found = solve(logistic_problem, method, tol=1e-10, max_steps=100)
    assert found.converged
    assert found.value == pytest.approx(best, rel=1e-14)
    assert found.num_steps <= {"newton_cholesky": 9, "newton_cg": 12, "lbfgs": 30}[method.name]
    gradient = jax.grad(logistic_problem.value)(found.params)
    assert np.linalg.norm(ravel_pytree(gradient)[0]) == pytest.approx(found.certificate, abs=1e-14)


def test_newton_is_quadratic(logistic_problem):
    found = solve(logistic_problem, newton_cholesky(), tol=1e-14, max_steps=30)
    norms = found.history.certificates
    late = norms[(norms < 1e-1) & (norms > 1e-7)]
    assert len(late) >= 2
    after = norms[np.isin(norms, late).nonzero()[0] + 1]
    # Digits double: |g'| <= C |g|^2, with one C from 0.1 down to 1e-7.
    assert (after <= 30 * late**2).all()


def test_inexact_newton_is_superlinear(logistic_problem):
    """|g'| <= C |g|^(3/2): the systems are solved to a residual of √|g| |g|."""
    found = solve(logistic_problem, newton_cg(), tol=1e-14, max_steps=30)
    norms = found.history.certificates
    late = np.flatnonzero((norms < 1e-1) & (norms > 1e-8))
    assert len(late) >= 3
    assert (norms[late + 1] <= 10 * norms[late] ** 1.5).all()


def test_lbfgs_is_linear(logistic_problem, best):
    """No slower than the bound of gradient descent, ``1 - μ/L`` a step, which it need not meet."""
    found = solve(logistic_problem, lbfgs(), tol=1e-10, max_steps=100)
    k, error = found.history.steps, found.history.values - best
    augmented = np.column_stack([X, np.ones(N)])
    weight = WEIGHTS / WEIGHTS.sum()
    largest = np.linalg.eigvalsh((augmented.T * weight) @ augmented)[-1] / 4 + 0.01
    assert (error <= error[0] * (1 - 0.01 / largest) ** k + 1e-15).all()
    # And each ten steps gain as much as the ten before: no tail.
    logs = np.log(np.maximum(error, 1e-15))
    assert logs[10] - logs[0] < -4
    assert logs[20] - logs[10] < -4


def test_newton_takes_one_step_for_least_squares():
    problem = LinearProblem(X, SCORES, squared(), none(), WEIGHTS, intercept=True)
    found = solve(problem, newton_cholesky(), tol=1e-12, max_steps=5)
    assert found.num_steps == 1
    augmented = np.column_stack([X, np.ones(N)]) * np.sqrt(WEIGHTS)[:, None]
    wanted = np.linalg.lstsq(augmented, SCORES * np.sqrt(WEIGHTS))[0]
    np.testing.assert_allclose(np.append(found.params.w, found.params.b), wanted, rtol=1e-10)


CASES = {
    "logistic": (logistic(), SIGNS),
    "squared_hinge": (squared_hinge(), SIGNS),
    "smoothed_hinge": (smoothed_hinge(0.5), SIGNS),
    "poisson": (poisson(), RANDOM.poisson(np.exp(0.5 * SCORES))),
    "multinomial": (multinomial(3), np.digitize(SCORES, [-0.5, 0.5])),
}


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("loss", ["logistic", "multinomial"])
def test_hessian_is_that_of_the_loss(loss, sparse):
    x = scipy.sparse.csr_array(X) if sparse else X
    problem = LinearProblem(x, CASES[loss][1], CASES[loss][0], none(), WEIGHTS, intercept=True)
    params = jax.tree.map(lambda p: RANDOM.standard_normal(p.shape), problem.init())
    flat, unravel = ravel_pytree(params)

    @jax.jit
    def both(problem, params):
        margins = problem.margins(params)
        product = lambda e: ravel_pytree(problem.curvature_product(margins, unravel(e)))[0]  # noqa: E731
        return problem.hessian(margins), jax.vmap(product)(np.eye(flat.size))

    # Products are held to JAX's derivatives in the tests of the problem.
    found, wanted = both(problem, params)
    np.testing.assert_allclose(found, wanted, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", CASES)
def test_all_three_agree_on_every_loss(name):
    loss, y = CASES[name]
    problem = LinearProblem(X, y, loss, l2(0.02), intercept=True)
    values = [
        solve(problem, method, tol=1e-9, max_steps=300).value
        for method in (newton_cholesky(), newton_cg(), lbfgs())
    ]
    np.testing.assert_allclose(values, min(values), rtol=1e-12)


def test_columns_that_depend_on_others_are_named():
    x = np.column_stack([X, X[:, 1] - 2 * X[:, 3]])
    for given in (x, scipy.sparse.csr_array(x)):
        problem = LinearProblem(given, SCORES, squared(), none())
        with pytest.raises(ValueError, match=r"rank 6 of 7 columns: those numbered [136] follow"):
            solve(problem, newton_cholesky())
    constant = np.column_stack([X, np.full(N, 2.0)])
    problem = LinearProblem(constant, SCORES, squared(), l2(0.0), intercept=True)
    with pytest.raises(ValueError, match=r"the intercept counted: .* l2\(strength > 0\)"):
        solve(problem, newton_cholesky())
    wide = LinearProblem(X[:4], SCORES[:4], squared(), none())
    with pytest.raises(ValueError, match="rank 4 of 6 columns"):
        solve(wide, newton_cholesky())
    regularised = LinearProblem(x, SCORES, squared(), l2(1e-6))
    assert solve(regularised, newton_cholesky(), tol=1e-9).converged
    without = solve(LinearProblem(x, SCORES, squared(), none()), lbfgs(), tol=1e-9)
    assert without.converged  # a minimum, if not the only one


def test_multinomial_without_a_penalty_is_not_refused():
    """Classes may be shifted alike; that is no dependence of columns."""
    loss, _ = CASES["multinomial"]
    y = RANDOM.integers(0, 3, N)  # does not separate
    problem = LinearProblem(X, y, loss, none(), intercept=True)
    found = solve(problem, newton_cholesky(), tol=1e-10, max_steps=50)
    assert found.converged
    assert found.value == pytest.approx(solve(problem, lbfgs(), tol=1e-8).value, rel=1e-12)


def test_what_they_cannot_do_names_what_can():
    for method in (newton_cholesky(), newton_cg(), lbfgs()):
        with pytest.raises(ValueError, match=r"no gradient at its corner.* Methods that can:"):
            solve(LinearProblem(X, SIGNS, hinge(), l2(1.0)), method)
        with pytest.raises(ValueError, match=r"penalty l1: .* Methods that can: .*proximal"):
            solve(LinearProblem(X, SIGNS, logistic(), l1(1.0)), method)
    with pytest.raises(ValueError, match="max_products"):
        newton_cg(0)
    with pytest.raises(ValueError, match="memory=0"):
        lbfgs(0)
