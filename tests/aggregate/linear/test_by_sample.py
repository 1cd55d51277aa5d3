"""Consensus ADMM, DANE and GIANT: scikit-learn's objective, limit cases, bytes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdml.aggregate.linear import consensus, dane, giant
from jdml.models.linear import LinearProblem, divide, hinge, l1, l2, multinomial
from jdml.optimize import newton_cholesky, solve
from jdml.sharding import bytes_per_axis, collectives
from tests.aggregate.linear.problems import LAM, data, least, mesh_of, problem_of

pytestmark = pytest.mark.usefixtures("compiled_lightly")


@pytest.mark.parametrize(
    ("case", "method", "num"),
    [
        ("logistic", consensus(), 4),
        ("logistic", dane(mu=0.05), 4),
        ("logistic", giant(), 4),
        ("digits", giant(), 8),
        ("digits", consensus(), 2),
        ("ridge", consensus(), 8),
        ("ridge", dane(), 4),
        ("lasso", consensus(), 4),
        ("elastic net", consensus(), 3),
    ],
    ids=str,
)
def test_the_objective_of_scikit_learn(case, method, num):
    found = solve(divide(problem_of(case), num), method, 1e-6, 2000, progress=False)
    assert found.converged
    assert found.value == pytest.approx(least(case), rel=1e-8)


@pytest.mark.parametrize("method", [consensus(), dane(mu=0.1), giant()], ids=lambda m: m.name)
def test_workers_of_a_mesh_do_what_is_simulated(method):
    problem = problem_of("ridge")
    simulated = solve(divide(problem, 4), method, 0.0, 3, progress=False)
    placed = solve(divide(problem, "data", mesh=mesh_of(4)), method, 0.0, 3, progress=False)
    np.testing.assert_allclose(placed.params.w, simulated.params.w, rtol=1e-8, atol=1e-10)
    assert placed.value == pytest.approx(simulated.value, rel=1e-10)


def test_giant_alone_is_newton():
    problem = problem_of("logistic", intercept=False)
    alone = solve(problem, newton_cholesky(), 0.0, 3, progress=False)
    found = solve(divide(problem, 1), giant(), 0.0, 3, progress=False)
    np.testing.assert_allclose(found.params.w, alone.params.w, rtol=1e-9)


def test_dane_alone_takes_one_step():
    problem = problem_of("logistic", intercept=False)
    found = solve(divide(problem, 1), dane(accuracy=1e-9), 1e-7, 5, progress=False)
    assert found.converged
    assert found.num_steps == 1


def test_a_hessian_serves_while_its_steps_gain():
    problem = divide(problem_of("logistic"), 4)
    run, matrices = solve(problem, consensus(), 0.0, 1, progress=False), []
    for _ in range(11):
        matrices.append(np.asarray(run.state.curvature.matrix))
        run = solve(problem, consensus(), 0.0, 1, state=run.state, progress=False)
    kept = [
        [np.array_equal(*pair) for pair in zip(a, b, strict=True)]
        for a, b in itertools.pairwise(matrices)
    ]
    assert not any(kept[0])
    assert np.sum(kept) > 20  # of 40
    # What a kept one finds is the local minimum still, to the accuracy asked for.
    state, accurate = run.state, consensus(accuracy=1e-6)
    fresh = state._replace(
        curvature=state.curvature._replace(serves=jnp.zeros_like(state.curvature.serves))
    )
    kept, new = (
        solve(problem, accurate, 0.0, 1, state=s, progress=False).state.x for s in (state, fresh)
    )
    moved = np.linalg.norm(new - state.x)
    assert 0 < np.linalg.norm(kept - new) < 1e-4 * moved


def test_several_classes():
    x, _ = data("diabetes")
    y = np.arange(len(x)) % 3
    problem = LinearProblem(x, y, multinomial(3), l2(LAM), intercept=True)
    alone = solve(problem, newton_cholesky(), 1e-9, progress=False).value
    found = solve(divide(problem, 2), consensus(), 1e-6, 500, progress=False)
    assert found.value == pytest.approx(alone, rel=1e-8)


@pytest.mark.parametrize(
    ("method", "numbers", "trials"),
    [
        # x̂ + u, and the primal residual
        (consensus(), 31 + 1, 0),
        # direction, gradient and objective; a trial of the step size
        (giant(), 31 + 31 + 1, 1),
        (dane(), 31 + 31 + 1, 1),
    ],
    ids=lambda m: getattr(m, "name", None),
)
def test_bytes_of_a_round(method, numbers, trials):
    mesh = mesh_of(2)
    problem = divide(problem_of("logistic"), "data", mesh=mesh)
    state = jax.jit(method.init)(problem, problem.init())
    compiled = jax.jit(method.step).lower(problem, state).compile()
    listed = collectives(compiled, mesh)
    assert bytes_per_axis(c for c in listed if c.count == 1) == {("data",): 8 * numbers}
    in_loops = [c for c in listed if c.count is None]
    assert sum(c.payload_bytes for c in in_loops) <= 2 * 8 * trials


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: solve(p, consensus()), "not divided"),
        (lambda p: solve(divide(p.replace(loss=hinge()), 2), consensus()), "can: .*cocoa"),
        (lambda p: solve(divide(p.replace(penalty=l1(1.0)), 2), giant()), "no gradient"),
        (lambda p: solve(divide(p.replace(penalty=l2(0.0)), 2), dane()), "singular"),
        (lambda p: consensus(rho=0.0), "rho"),
        (lambda p: consensus(over_relaxation=2.0), "over_relaxation"),
        (lambda p: consensus(accuracy=1.0), "accuracy"),
        (lambda p: dane(eta=0.0), "eta"),
        (lambda p: dane(accuracy=0.0), "accuracy"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make(problem_of("logistic", intercept=False))
