"""Methods whose workers have columns: scikit-learn's objective, limit cases, bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

from jdml.aggregate.linear import feature_cocoa, gauss_seidel, jacobi, sharing
from jdml.aggregate.linear.sharing import loss_prox
from jdml.models.linear import (
    LinearProblem,
    divide,
    elastic_net,
    hinge,
    l1,
    l1_ball,
    l2,
    logistic,
    poisson,
    smoothed_hinge,
    squared,
    squared_hinge,
)
from jdml.optimize import newton_cholesky, solve
from jdml.partition import coordinate_blocks, safe_damping, separability
from jdml.sharding import bytes_per_axis, collectives
from tests.aggregate.linear.problems import data, least, mesh_of, problem_of

METHODS = [feature_cocoa(), jacobi(), gauss_seidel(), sharing()]


@pytest.mark.parametrize(
    ("case", "method", "num"),
    [
        ("logistic", feature_cocoa(passes=2), 4),
        ("lasso", feature_cocoa(), 5),
        ("elastic net", feature_cocoa(), 2),
        ("ridge", jacobi(local_steps=4), 3),
        ("lasso", jacobi(local_steps=4), 2),
        ("ridge", gauss_seidel(local_steps=4), 3),
        ("lasso", gauss_seidel(local_steps=4), 5),
    ],
    ids=str,
)
def test_the_objective_of_scikit_learn(case, method, num):
    divided = divide(problem_of(case), features=num)
    found = solve(divided, method, 3e-6, 60_000, check_every=20, progress=False)
    assert found.converged
    assert found.value == pytest.approx(least(case), rel=1e-8)


@pytest.mark.parametrize(
    ("case", "num"), [pytest.param("logistic", 4, marks=pytest.mark.slow), ("ridge", 5)]
)
def test_sharing_finds_the_minimum(case, num):
    problem = problem_of(case, intercept=False)
    alone = solve(problem, newton_cholesky(), 1e-10, progress=False).value
    divided = divide(problem, features=num)
    found = solve(divided, sharing(), 3e-6, 5000, check_every=10, progress=False)
    assert found.converged
    assert found.value == pytest.approx(alone, rel=1e-8)


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(m, marks=pytest.mark.slow) if m.name in ("jacobi", "gauss_seidel") else m
        for m in METHODS
    ],
    ids=lambda m: m.name,
)
def test_workers_of_a_mesh_do_what_is_simulated(method):
    problem = problem_of("logistic", intercept=False)
    rows = scipy.sparse.csr_array(np.where(np.abs(data("cancer")[0]) > 0.7, data("cancer")[0], 0))
    problem = LinearProblem(rows, data("cancer")[1], logistic(), l2(0.01))
    simulated = solve(divide(problem, features=4), method, 0.0, 3, progress=False)
    placed = divide(problem, features="model", mesh=mesh_of(4, "model"))
    found = solve(placed, method, 0.0, 3, progress=False)
    np.testing.assert_allclose(found.params.w, simulated.params.w, rtol=1e-8, atol=1e-11)
    # Margins are carried along; the parameters' own are the same.
    np.testing.assert_allclose(
        found.state.margins, jax.jit(lambda p, w: p.margins(w))(placed, found.params), atol=1e-10
    )


@pytest.mark.parametrize("method", METHODS[:3], ids=lambda m: m.name)
def test_every_round_is_a_descent(method):
    divided = divide(problem_of("elastic net"), features=5)
    values = solve(divided, method, 0.0, 50, check_every=1, progress=False).history.values
    assert (np.diff(values) <= 1e-13).all()


def test_blocks_that_do_not_meet_need_no_damping():
    rng = np.random.default_rng(0)
    x = scipy.sparse.block_diag(
        [scipy.sparse.csr_array(rng.normal(size=(20, 3))) for _ in range(4)], format="csr"
    )
    omega = separability(x, coordinate_blocks(12, 4))
    assert omega == 1
    problem = LinearProblem(x, rng.normal(size=80), squared(), l2(0.1))
    divided = divide(problem, features=4)
    together = jacobi(safe_damping(omega, 4))
    states = [
        solve(divided, method, 0.0, 5, progress=False).params.w
        for method in (together, gauss_seidel())
    ]
    np.testing.assert_allclose(*states, rtol=1e-10)


@pytest.mark.parametrize(
    "loss",
    [logistic(), squared(), squared_hinge(), smoothed_hinge(0.5), poisson()],
    ids=lambda loss: loss.name,
)
def test_the_prox_of_a_loss(loss):
    at = jnp.linspace(-4.0, 4.0, 33)
    y = jnp.where(jnp.arange(33) % 2 == 0, 1.0, -1.0 if loss.name != "poisson" else 3.0)
    for q in (0.0, 0.3, 5.0, 500.0):
        a = loss_prox(loss, at, jnp.full(33, q), y)
        np.testing.assert_allclose(a + q * loss.derivative(a, y), at, rtol=0, atol=2e-9)


@pytest.mark.parametrize(
    ("method", "times"), [(m, 4 if m.name == "gauss_seidel" else 1) for m in METHODS], ids=str
)
def test_bytes_of_a_round(method, times):
    mesh = mesh_of(4, "model")
    problem = divide(problem_of("ridge", intercept=False), features="model", mesh=mesh)
    state = jax.jit(method.init)(problem, problem.init())
    compiled = jax.jit(method.step).lower(problem, state).compile()
    sent = bytes_per_axis(collectives(compiled, mesh))
    assert sent == {("model",): times * 2 * 3 * 442 * 8 // 4}


@pytest.mark.parametrize(
    ("change", "method", "message"),
    [
        ({}, feature_cocoa(), "not divided"),
        ({"penalty": l1_ball(1.0)}, feature_cocoa(), "no sum over coordinates"),
        ({"loss": hinge()}, jacobi(), "no gradient at its corner"),
        ({"loss": poisson()}, gauss_seidel(), "no bound.*can: .*sharing"),
        ({"penalty": l1(1.0)}, sharing(), "can: .*feature_cocoa"),
        ({"penalty": elastic_net(1.0, 1.0)}, sharing(), "linear system"),
        ({"intercept": True}, sharing(), "column of ones"),
    ],
)
def test_refusals(change, method, message):
    problem = problem_of("ridge", intercept=False).replace(**change)
    divided = divide(problem, features=2) if change else problem
    with pytest.raises(ValueError, match=message):
        solve(divided, method, progress=False)


def test_arguments():
    for make in (
        lambda: feature_cocoa(gamma=0.0),
        lambda: feature_cocoa(sigma=0.0),
        lambda: feature_cocoa(passes=0),
        lambda: jacobi(damping=2.0),
        lambda: gauss_seidel(local_steps=0),
        lambda: sharing(rho=-1.0),
    ):
        with pytest.raises(ValueError, match="expected"):
            make()
