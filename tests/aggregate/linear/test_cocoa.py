"""CoCoA against SDCA, its own certificate, and the bytes of the compiled program."""

import functools

import jax
import numpy as np
import pytest
import scipy.sparse
from sklearn.datasets import load_breast_cancer, load_diabetes

from jdml.aggregate.linear import LocalSDCA, LocalSDNA, cocoa
from jdml.communicate import error_feedback
from jdml.communicate.codecs import int8
from jdml.models.linear import (
    LinearProblem,
    divide,
    elastic_net,
    hinge,
    l1,
    l2,
    logistic,
    poisson,
    smoothed_hinge,
    squared,
)
from jdml.optimize import newton_cholesky, sdca, solve
from jdml.optimize.dual.gap import dual_to_primal, duality_gap
from jdml.sharding import bytes_per_axis, collectives, make_mesh

LAM = 0.01


@functools.cache
def data(name="cancer"):
    x, y = (load_breast_cancer if name == "cancer" else load_diabetes)(return_X_y=True)
    x = (x - x.mean(0)) / x.std(0)
    return x, np.where(y > 0, 1.0, -1.0) if name == "cancer" else y / y.std()


def problem_of(loss=None, penalty=None, sparse=False, name="cancer"):
    x, y = data(name)
    x = scipy.sparse.csr_array(np.where(np.abs(x) > 0.5, x, 0)) if sparse else x
    return LinearProblem(x, y, loss or logistic(), penalty or l2(LAM))


def mesh_of(num):
    return make_mesh({"data": num}, devices=jax.devices()[:num])


def run(problem, method, rounds, tol=0.0):
    return solve(problem, method, tol, rounds, check_every=1, progress=False)


@pytest.mark.parametrize(
    "sparse", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["dense", "sparse"]
)
def test_one_worker_is_sdca(sparse):
    problem = problem_of(hinge(), elastic_net(0.001, LAM), sparse)
    alone = run(problem, sdca(shrink=False, seed=3), 3).state
    state = run(divide(problem, 1), cocoa(seed=3), 3).state
    np.testing.assert_allclose(state.alpha[0], alone.alpha, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(state.u, alone.u, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", [logistic(), hinge(), smoothed_hinge(0.5)], ids=str)
@pytest.mark.parametrize(
    "method",
    [cocoa(), cocoa(gamma=None), cocoa(sigma="measured"), cocoa(gamma="search")],
    ids=["adding", "averaging", "measured", "search"],
)
def test_simulated_workers_raise_the_dual_every_round(method, loss):
    found = run(divide(problem_of(loss), 8), method, 40).history
    dual = found.values - found.certificates
    # Safe σ' makes every round an ascent, whatever the others do.
    assert (np.diff(dual) >= -1e-12).all()
    assert found.certificates[-1] < 0.2 * found.certificates[0]


@pytest.mark.parametrize("penalty", [l2(LAM), elastic_net(0.001, LAM)], ids=["l2", "elastic net"])
def test_a_search_holds_a_true_gap_that_never_rises(penalty):
    problem = divide(problem_of(hinge(), penalty), 8)
    first = run(problem, cocoa(gamma="search"), 5)
    state = first.state
    value, gap = duality_gap(problem, state.alpha.ravel(), state.u)
    # D is that of α, P that of the answer, which no point of the dual has to be.
    assert state.dual == pytest.approx(float(value - gap), rel=1e-9)
    u = dual_to_primal(problem, state.alpha.ravel())
    np.testing.assert_allclose(state.u, u, rtol=1e-9, atol=1e-12)
    assert first.value == pytest.approx(float(problem.value(first.params)), rel=1e-12)
    assert first.certificate == pytest.approx(float(first.value - state.dual), rel=1e-9)
    history = first.history
    assert (np.diff(history.values) <= 1e-12).all()
    assert (np.diff(history.certificates) <= 1e-12).all()


def test_a_search_goes_on_bit_for_bit_and_from_given_weights():
    problem, method = divide(problem_of(hinge(), elastic_net(0.001, LAM)), 8), cocoa(gamma="search")
    whole = run(problem, method, 5)
    state = run(problem, method, 3).state
    again = solve(problem, method, 0.0, 2, state=state, check_every=1, progress=False)
    jax.tree.map(np.testing.assert_array_equal, again.state.alpha, whole.state.alpha)
    np.testing.assert_array_equal(again.params.w, whole.params.w)
    warm = solve(problem, method, 0.0, 0, params=whole.params, progress=False)
    assert warm.value == pytest.approx(whole.value, rel=1e-12)


def test_one_worker_has_nothing_to_search():
    problem = divide(problem_of(hinge()), 1)
    plain, searched = (run(problem, cocoa(gamma=g, seed=3), 3) for g in (1.0, "search"))
    np.testing.assert_array_equal(plain.state.alpha, searched.state.alpha)
    assert plain.certificate == searched.certificate


@pytest.mark.slow
def test_a_measured_sigma_is_the_quotient_of_the_round():
    # Workers with the same rows, who solve their subproblems, want the same change: c = K. Workers
    # with columns of their own do not meet: c = 1, and from then on each does what it would alone.
    x, y = data("diabetes")
    n = len(x)
    method = cocoa(sigma="measured", local=LocalSDNA(n))
    for rows, expected in (
        (np.tile(x, (3, 1)), 3.0),
        (np.kron(np.eye(3), x), 1.0),
    ):
        problem = LinearProblem(rows, np.tile(y, 3), squared(), l2(LAM))
        # Of the first round: after it, of rows that are alike, nothing but rounding is left.
        found = run(divide(problem, 3), method, 1)
        np.testing.assert_allclose(found.state.sigma, expected, rtol=1e-7)
    found = run(divide(problem, 3), method, 2)
    alone = LinearProblem(x, y, squared(), l2(3 * LAM))
    least = solve(alone, newton_cholesky(), 1e-10, progress=False).value
    assert found.value == pytest.approx(least, rel=1e-9)


@pytest.mark.slow
def test_rounds_grow_by_at_most_two_with_a_measured_sigma():
    random = np.random.default_rng(0)
    x = random.normal(size=(1600, 400)) / 20
    y = np.where(x @ random.normal(size=400) > 0, 1.0, -1.0)
    problem = LinearProblem(x, y, logistic(), l2(1e-3))
    alone, measured, safe = (
        run(divide(problem, num), cocoa(sigma=sigma), 200, 1e-4).num_steps
        for num, sigma in ((1, None), (16, "measured"), (16, None))
    )
    searched = run(divide(problem, 16), cocoa(gamma="search"), 200, 1e-4).num_steps
    assert measured <= 2 * alone
    assert searched <= 2 * alone
    assert safe > 2 * measured


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(cocoa(), marks=pytest.mark.slow),
        cocoa(sigma="measured"),
        pytest.param(cocoa(gamma="search"), marks=pytest.mark.slow),
    ],
    ids=["safe", "measured", "search"],
)
def test_a_mesh_does_what_is_simulated(method):
    problem = problem_of(hinge(), sparse=True)
    simulated = run(divide(problem, 4), method, 3)
    placed = run(divide(problem, "data", mesh=mesh_of(4)), method, 3)
    np.testing.assert_allclose(placed.state.alpha, simulated.state.alpha, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(placed.params.w, simulated.params.w, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("num", [1, 8, 64])
def test_the_optimum_of_scikit_learn(num):
    # A gap of 1e-9 bounds the distance from the minimum, which Newton found to rounding.
    problem = problem_of(squared(), l2(0.5), name="diabetes")
    least = solve(problem, newton_cholesky(), 1e-10, progress=False).value
    method = cocoa(local=LocalSDNA(block=16, passes=3))
    found = solve(divide(problem, num), method, 1e-9, 1000, progress=False)
    assert found.converged
    assert found.value == pytest.approx(least, rel=1e-8)


@pytest.mark.parametrize(
    ("method", "numbers"),
    [
        (cocoa(), 30),
        (cocoa(sigma="measured"), 30 + 1),
        pytest.param(cocoa(gamma="search"), 30 + 10, marks=pytest.mark.slow),
    ],
    ids=["safe", "measured", "search"],
)
def test_bytes_of_a_round(method, numbers):
    mesh = mesh_of(4)
    problem = divide(problem_of(), "data", mesh=mesh)
    state = method.init(problem, problem.init())
    compiled = jax.jit(method.step).lower(problem, state).compile()
    sent = bytes_per_axis(collectives(compiled, mesh))
    assert sent == {("data",): 2 * 3 * numbers * 8 // 4}


def test_a_codec_sends_fewer_bytes_and_the_certificate_stays_exact():
    mesh = mesh_of(4)
    problem = divide(problem_of(smoothed_hinge(1.0), l2(0.1)), "data", mesh=mesh)
    method = cocoa(codec=error_feedback(int8(block=32)))
    found = run(problem, method, 200, 1e-5)
    assert found.converged
    exact = problem.value(found.params)
    np.testing.assert_allclose(exact, found.value, rtol=1e-12)
    compiled = jax.jit(method.step).lower(problem, found.state).compile()
    sent = bytes_per_axis(collectives(compiled, mesh))
    assert sent == {("data",): 2 * 3 * int8(block=32).payload_bytes(32)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: solve(problem_of(), cocoa()), "not divided"),
        (lambda: solve(divide(problem_of(), features=2), cocoa()), "by sample alone"),
        (lambda: solve(divide(problem_of(penalty=l1(1.0)), 2), cocoa()), "not strongly convex"),
        (
            lambda: solve(divide(LinearProblem(*data("diabetes"), poisson(), l2(1.0)), 2), cocoa()),
            "no dual form.*can: .*lbfgs",
        ),
        (lambda: cocoa(codec=int8()), "error_feedback"),
        (lambda: cocoa(gamma=2.0), "gamma"),
        (lambda: cocoa(gamma="look"), "search"),
        (lambda: cocoa(gamma="search", sigma="measured"), "expected gamma=1"),
        (lambda: cocoa(gamma="search", codec=error_feedback(int8())), "exact sum"),
        (lambda: cocoa(sigma=-1.0), "sigma"),
        (lambda: cocoa(sigma="estimate"), "measured"),
        (lambda: cocoa(gamma=None, sigma="measured"), "expected gamma=1"),
        (lambda: cocoa(sigma="measured", codec=error_feedback(int8())), "no codec"),
        (lambda: LocalSDCA(0), "passes"),
        (
            lambda: solve(divide(problem_of(), 2), cocoa(codec=error_feedback(int8()))),
            "simulated",
        ),
        (lambda: divide(problem_of(), 570), "570 workers and 569 rows"),
        (lambda: divide(problem_of(), features=31), "31 workers and 30 columns"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
