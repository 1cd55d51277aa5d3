"""What ``solve`` does with any method: histories, going on, stopping, showing, refusing."""

import jax
import numpy as np
import pytest

from jdml.models.linear import LinearProblem, l2, logistic, poisson
from jdml.optimize import Method, accelerated, gradient_descent, methods_for, solve
from jdml.optimize.base import known_methods

RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((30, 3))
Y = np.where(X[:, 0] + RANDOM.standard_normal(30) > 0, 1, -1)


@pytest.fixture(scope="module")
def problem():
    with jax.enable_x64(True):
        yield LinearProblem(X, Y, logistic(), l2(0.1))


def test_history_has_every_check_and_the_last_is_the_solution(problem):
    found = solve(problem, accelerated(), tol=1e-8)
    history = found.history
    assert history.steps.tolist() == list(range(found.num_steps + 1))
    assert history.values[0] == pytest.approx(np.log(2))
    assert (history.values[-1], history.certificates[-1]) == (found.value, found.certificate)
    assert (history.certificates[:-1] > 1e-8).all()
    assert found.certificate <= 1e-8
    assert found.converged
    assert found.value == pytest.approx(float(problem.value(found.params)), rel=1e-14)


def test_checks_are_as_far_apart_as_asked(problem):
    found = solve(problem, gradient_descent(), tol=0, max_steps=23, check_every=10)
    assert found.history.steps.tolist() == [0, 10, 20, 23]
    assert found.num_steps == 23
    assert not found.converged
    one_by_one = solve(problem, gradient_descent(), tol=0, max_steps=23)
    np.testing.assert_array_equal(found.params.w, one_by_one.params.w)
    np.testing.assert_array_equal(found.history.values, one_by_one.history.values[[0, 10, 20, 23]])


def test_many_calls_of_the_program_are_as_one(problem, monkeypatch):
    whole = solve(problem, accelerated(), tol=0, max_steps=40)
    # A call that is said to take for ever is asked for one check at a time.
    clock = iter(range(0, 10**6, 100))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    pieces = solve(problem, accelerated(), tol=0, max_steps=40)
    for a, b in zip(whole.history, pieces.history, strict=True):
        np.testing.assert_array_equal(a, b)


def test_going_on_from_a_state_and_from_parameters(problem):
    whole = solve(problem, accelerated(), tol=0, max_steps=20)
    half = solve(problem, accelerated(), tol=0, max_steps=10)
    rest = solve(problem, accelerated(), tol=0, max_steps=10, state=half.state)
    np.testing.assert_array_equal(rest.params.w, whole.params.w)
    near = solve(problem, accelerated(), tol=1e-6, params=whole.params)
    assert near.num_steps < 5
    done = solve(problem, accelerated(), tol=1e-3, params=near.params)
    assert (done.num_steps, done.converged) == (0, True)


def test_a_second_solve_compiles_nothing(problem):
    solve(problem, accelerated(), tol=1e-3)
    again = solve(problem.replace(penalty=l2(0.2)), accelerated(), tol=1e-6)
    assert again.compile_seconds < 0.1  # tracing alone takes longer


def test_ends_where_numbers_end():
    problem = LinearProblem(X, np.arange(30), poisson(), l2(0.0))
    found = solve(problem, gradient_descent(step_size=1e3), tol=1e-6, max_steps=1000)
    assert not found.converged
    assert found.num_steps < 1000
    assert not np.isfinite(found.value)


def test_a_line_of_progress(problem, capsys):
    solve(problem, accelerated(), tol=1e-6, progress=True)
    shown = capsys.readouterr().err
    assert "accelerated: step" in shown
    assert "gradient norm" in shown
    solve(problem, accelerated(), tol=1e-6)  # no terminal here
    assert capsys.readouterr().err == ""


def test_f64_wants_a_session_that_has_it(problem):
    with (
        jax.enable_x64(False),
        pytest.raises(ValueError, match=r"problem is in float64.*jax_enable_x64"),
    ):
        solve(problem, accelerated())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tol": -1.0}, "tol=-1"),
        ({"tol": np.nan}, "tol=nan"),
        ({"max_steps": -1}, "max_steps=-1"),
        ({"check_every": 0}, "check_every=0"),
        ({"params": 1, "state": 2}, "expected one of them"),
    ],
)
def test_refused(problem, arguments, message):
    with pytest.raises(ValueError, match=message):
        solve(problem, accelerated(), **arguments)


def test_every_method_has_its_place_in_the_taxonomy(problem):
    known = known_methods()
    assert len(known) == len({method.name for method in known})
    for method in known:
        assert method.order in ("first", "second")
        assert method.sampling in ("deterministic", "stochastic")
        assert method.space in ("primal", "dual")
        assert issubclass(method, Method)
    cells = {(m.sampling, m.order) for m in known if m.space == "primal"}
    assert len(cells) == 4
    able = methods_for(problem)
    assert {"gradient_descent", "newton_cg", "lbfgs", "sgd", "saga"} <= set(able)
    assert "frank_wolfe" not in able
