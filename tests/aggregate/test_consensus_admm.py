"""Consensus ADMM against closed forms, and what its state says on the way."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdml.aggregate import (
    consensus_admm,
    prox_box,
    prox_elastic_net,
    prox_l1,
    prox_l2,
    prox_non_negative,
)
from jdml.sharding import make_mesh
from jdml.train import make_step

K, N, D = 4, 20, 5


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(K * N, D)).astype(np.float32)
    truth = np.array([1.5, -2.0, 0.0, 0.0, 0.7], np.float32)
    y = (x @ truth + 0.1 * rng.normal(size=K * N)).astype(np.float32)
    return x, y


def loss_fn(params, batch, key):
    return 0.5 * jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2), {}


def solve(problem, num_rounds=60, every=20, inner=None, **options):
    x, y = problem
    mesh = make_mesh({"data": K}, devices=jax.devices()[:K])
    tx = consensus_admm(inner or optax.sgd(0.2), "data", every=every, **options)
    init, step = make_step(loss_fn, tx, mesh)
    state = init({"w": jnp.zeros(D, x.dtype)}, 0)
    for _ in range(num_rounds * every):
        state, metrics = step(state, {"x": x, "y": y})
    return state, metrics


def quadratic(problem):
    """``A, b`` of ``sum_k f_k(w) = w A w / 2 - b w + const``."""
    x, y = (a.reshape(K, N, -1).astype(np.float64) for a in problem)
    return np.einsum("kni,knj->ij", x, x) / N, np.einsum("kni,knj->i", x, y) / N


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"over_relaxation": 1.6}, marks=pytest.mark.slow),
        pytest.param({"adaptive": True, "rho": 0.02}, marks=pytest.mark.slow),
    ],
)
def test_ridge_reaches_the_closed_form(problem, options):
    state, _ = solve(problem, prox=prox_l2(0.4), **options)
    a, b = quadratic(problem)
    np.testing.assert_allclose(
        state.opt_state.z["w"], np.linalg.solve(a + 0.4 * np.eye(D), b), atol=2e-5
    )
    assert float(state.opt_state.metrics["admm_converged"]) == 1
    if "adaptive" in options:
        assert float(state.opt_state.rho) > 0.02


def test_rho_rests_once_both_residuals_are_within_their_tolerances(problem):
    """z = 0 from the start to the end, so the dual residual is 0 and rho would grow for ever."""
    options = {"adaptive": True, "prox": prox_l1(1e3), "absolute_tolerance": 1e-2}
    early, _ = solve(problem, num_rounds=20, inner=optax.sgd(0.05), **options)
    late, _ = solve(problem, num_rounds=25, inner=optax.sgd(0.05), **options)
    assert float(early.opt_state.metrics["admm_converged"]) == 1
    assert 1 < float(early.opt_state.rho) < 40
    assert float(late.opt_state.rho) == float(early.opt_state.rho)
    np.testing.assert_array_equal(late.opt_state.z["w"], 0)


def test_parameters_in_f64_with_l_bfgs_inside(problem):
    """What is exchanged is f32, but it is a distance: rounding shrinks with the dual variables."""
    with jax.enable_x64(True):
        x, y = (a.astype(np.float64) for a in problem)
        inner = optax.lbfgs(1.0, linesearch=None)
        options = {"num_rounds": 40, "every": 8, "restart_inner": True, "prox": prox_l2(0.4)}
        state, _ = solve((x, y), inner=inner, **options)
        assert state.opt_state.dual["w"].dtype == state.opt_state.z["w"].dtype == jnp.float64
        a, b = quadratic((x, y))
        np.testing.assert_allclose(
            state.opt_state.z["w"], np.linalg.solve(a + 0.4 * np.eye(D), b), atol=1e-8
        )


def test_lasso_satisfies_its_optimality_condition(problem):
    strength = 2.0
    state, _ = solve(problem, prox=prox_l1(strength))
    z = np.asarray(state.opt_state.z["w"], np.float64)
    a, b = quadratic(problem)
    slope = b - a @ z  # must equal strength * sign(z), or lie within it where z = 0
    assert 0 < np.sum(z == 0) < D
    np.testing.assert_allclose(slope[z != 0], strength * np.sign(z[z != 0]), atol=1e-4)
    assert (np.abs(slope[z == 0]) <= strength + 1e-4).all()


def test_constraints_hold_exactly(problem):
    state, _ = solve(problem, num_rounds=10, prox=prox_non_negative())
    assert (np.asarray(state.opt_state.z["w"]) >= 0).all()
    state, _ = solve(problem, num_rounds=10, prox=prox_box(-0.5, 0.5))
    assert (np.abs(np.asarray(state.opt_state.z["w"])) <= 0.5).all()


def test_residuals_are_those_of_the_iterates(problem):
    """Recomputed from the state, and the dual variables sum to zero without a penalty."""
    before, _ = solve(problem, num_rounds=3, rho=2.0)
    state, _ = solve(problem, num_rounds=4, rho=2.0)
    x, z = (np.asarray(v["w"], np.float64) for v in (state.params, state.opt_state.z))
    u, z_old = np.asarray(state.opt_state.dual["w"]), np.asarray(before.opt_state.z["w"])
    expected = {
        "admm_primal": np.linalg.norm(x - z),
        "admm_dual": 2.0 * np.sqrt(K) * np.linalg.norm(z - z_old),
        "admm_primal_tolerance": np.sqrt(K * D) * 1e-4
        + 1e-3 * max(np.linalg.norm(x), np.sqrt(K) * np.linalg.norm(z)),
        "admm_dual_tolerance": np.sqrt(K * D) * 1e-4 + 1e-3 * 2.0 * np.linalg.norm(u),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(state.opt_state.metrics[name], value, rtol=1e-3, err_msg=name)
    np.testing.assert_allclose(u.sum(0), 0, atol=1e-5)


@pytest.mark.parametrize(
    ("prox", "penalty"),
    [
        (prox_l1(0.7), lambda z: 0.7 * abs(z)),
        (prox_l2(0.7), lambda z: 0.35 * z**2),
        (prox_elastic_net(0.3, 0.7), lambda z: 0.3 * abs(z) + 0.35 * z**2),
        (prox_box(-0.5, 1.0), lambda z: np.where((z >= -0.5) & (z <= 1), 0, np.inf)),
        (prox_non_negative(), lambda z: np.where(z >= 0, 0, np.inf)),
    ],
)
def test_proximal_operators_minimise_what_they_claim(prox, penalty):
    grid, step = np.linspace(-4, 4, 160_001), 0.8
    v = np.array([-3.0, -0.2, 0.0, 0.5, 2.5], np.float32)
    best = [grid[np.argmin(penalty(grid) + (grid - a) ** 2 / (2 * step))] for a in v]
    np.testing.assert_allclose(prox({"w": v}, step)["w"], best, atol=1e-4)


def test_a_mask_spares_the_intercept():
    tree = {"w": jnp.ones(2), "intercept": jnp.ones(())}
    out = prox_l1(0.5, lambda p: {"w": True, "intercept": False})(tree, 1.0)
    np.testing.assert_array_equal(out["w"], 0.5)
    assert out["intercept"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": 0.0}, "penalty > 0"),
        ({"rho": float("nan")}, "penalty > 0"),
        ({"every": 0}, "int >= 1"),
        ({"over_relaxation": 2.0}, "0 < a < 2"),
        ({"relative_tolerance": -1.0}, "must not be negative"),
    ],
)
def test_refuses_what_cannot_work(options, message):
    with pytest.raises(ValueError, match=message):
        consensus_admm(optax.sgd(0.1), "data", **options)
    with pytest.raises(ValueError, match="expected >= 0"):
        prox_l1(-1.0)
    with pytest.raises(ValueError, match="low <= high"):
        prox_box(1.0, 0.0)
