"""SDCA and cyclic ascent against loops in NumPy, the theory, and liblinear."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from sklearn.svm import LinearSVC

from jdml.models.linear import (
    LinearProblem,
    elastic_net,
    hinge,
    l1,
    l2,
    logistic,
    poisson,
    smoothed_hinge,
    squared,
    squared_hinge,
)
from jdml.optimize import solve
from jdml.optimize.dual import cyclic_dual_ascent, local_sdca, sdca
from jdml.optimize.dual.ascent import samples_of

LOSSES = [squared(), logistic(), hinge(), squared_hinge(), smoothed_hinge(0.5)]
SMOOTH = [loss for loss in LOSSES if loss.name != "hinge"]
N, D = 60, 7


def by_name(loss):
    return loss.name


def data(seed=0, n=N, d=D):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) * (rng.random((n, d)) < 0.6)
    y = np.where(x @ rng.normal(size=d) + 0.5 * rng.normal(size=n) > 0, 1.0, -1.0)
    return x, y, rng.random(n) + 0.1


def problem_of(loss, penalty=None, sparse=False):
    x, y, weight = data()
    x = scipy.sparse.csr_array(x) if sparse else x
    return LinearProblem(x, y, loss, penalty or l2(0.05), sample_weight=weight)


def passes_in_numpy(problem, alpha, u, num_passes, sigma=1.0, kappa=0.0):
    """The plain sequential loop, cyclic."""
    x, y, weight = data()
    s = weight * len(y) / weight.sum()
    alpha, u = np.array(alpha), np.array(u)
    scale = sigma * s / (float(problem.penalty.l2) * len(y))
    for _ in range(num_passes):
        for i in range(len(y)):
            w = np.sign(u) * np.maximum(np.abs(u) - kappa, 0)
            q = scale[i] * x[i] @ x[i]
            change = float(problem.loss.dual_step(jnp.asarray(x[i] @ w), q, alpha[i], y[i]))
            alpha[i] += change
            u += scale[i] * change * x[i]
    return alpha, u


def run(problem, method, num_passes, state=None):
    return solve(problem, method, 0.0, num_passes, state=state, check_every=1, progress=False)


@pytest.mark.parametrize("loss", LOSSES, ids=by_name)
def test_a_pass_is_the_sequential_loop(loss):
    problem = problem_of(loss)
    state = run(problem, cyclic_dual_ascent(), 2).state
    alpha, u = passes_in_numpy(problem, np.zeros(N), np.zeros(D), 2)
    np.testing.assert_allclose(state.alpha, alpha, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(state.u, u, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", [sdca(), sdca(replace=True)], ids=["permutation", "replace"])
def test_sparse_rows_are_dense_rows(method):
    dense, sparse = (
        run(problem_of(squared_hinge(), elastic_net(0.02, 0.05), kind), method, 12).state
        for kind in (False, True)
    )
    np.testing.assert_allclose(sparse.alpha, dense.alpha, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(sparse.u, dense.u, rtol=1e-10, atol=1e-12)


def test_an_elastic_net_shrinks_u():
    problem = problem_of(hinge(), elastic_net(0.02, 0.05))
    state = run(problem, cyclic_dual_ascent(), 2).state
    alpha, u = passes_in_numpy(problem, np.zeros(N), np.zeros(D), 2, kappa=0.02 / 0.05)
    np.testing.assert_allclose(state.alpha, alpha, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(state.u, u, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES, ids=by_name)
def test_the_dual_never_falls_and_the_gap_is_a_gap(loss):
    found = run(problem_of(loss), cyclic_dual_ascent(), 30).history
    dual = found.values - found.certificates
    assert (found.certificates >= 0).all()
    assert (np.diff(dual) >= -1e-13).all()
    # Weak duality: no dual value is above any primal one.
    assert dual.max() <= found.values.min() + 1e-13


@pytest.mark.parametrize("loss", SMOOTH, ids=by_name)
def test_the_gap_falls_linearly_with_smooth_losses(loss):
    # Shalev-Shwartz & Zhang, theorem 5, with max s|x|² in place of 1: in expectation the gap is at
    # most (n + L/λ) / n times exp(-1 / (n + L/λ)) per coordinate step, L = max s|x|² φ''.
    problem = problem_of(loss)
    found = run(problem, sdca(shrink=False), 80).history
    spread = float(jnp.max(problem.sample_weight * problem.rows.squared_norms()))
    rate = np.exp(-N / (N + spread * loss.smoothness / 0.05))
    gaps = np.maximum(found.certificates, 1e-14)
    bound = gaps[0] * (N + spread * loss.smoothness / 0.05) / N * rate**found.steps
    assert (gaps <= np.maximum(bound, 2e-14)).all()
    assert gaps[-1] < 1e-7 * gaps[0]


def test_permutations_visit_each_sample_once_and_are_resumed():
    problem = problem_of(squared())
    method = sdca()
    first = run(problem, method, 1)
    assert (first.state.alpha != 0).all()
    on = run(problem, method, 2, state=first.state).state
    whole = run(problem, method, 3).state
    np.testing.assert_array_equal(on.alpha, whole.alpha)
    # Drawn with replacement, (1 - 1/n)^n of the samples are not visited.
    drawn = run(problem, sdca(replace=True), 1).state
    assert 0.25 < float(jnp.mean(drawn.alpha == 0)) < 0.5


def test_another_seed_is_another_order():
    samples = samples_of(problem_of(squared()))
    go = jax.jit(lambda seed: local_sdca(squared(), samples, zero, jnp.zeros(D), N, seed)[0])
    zero = jnp.zeros(N)
    assert (go(jnp.uint32(0)) != go(jnp.uint32(1))).any()


@pytest.mark.parametrize("loss", [hinge(), squared_hinge()], ids=by_name)
def test_liblinear_finds_the_same_objective(loss):
    x, y, weight = data(1, 200, 10)
    strength = 0.1
    problem = LinearProblem(x, y, loss, l2(strength), sample_weight=weight)
    found = solve(problem, sdca(), 1e-10, 100_000, progress=False)
    assert found.converged
    model = LinearSVC(
        loss=loss.name, C=1 / (strength * weight.sum()), fit_intercept=False, tol=1e-7,
        max_iter=100_000, dual=True, random_state=0,
    ).fit(x, y, sample_weight=weight)  # fmt: skip
    theirs = problem.value(problem.init()._replace(w=jnp.asarray(model.coef_[0])))
    np.testing.assert_allclose(found.value, theirs, rtol=1e-8)
    # Samples beyond the margin were left out.
    assert int(found.state.active.size) < 200


def test_a_local_solver_ascends_the_stretched_subproblem():
    problem = problem_of(hinge())
    rng = np.random.default_rng(2)
    alpha = np.asarray(problem.y) * rng.random(N)
    u = rng.normal(size=D)
    find = jax.jit(
        lambda samples, alpha, u: local_sdca(
            problem.loss, samples, alpha, u, 2 * N, jnp.uint32(0), sigma=4.0, draw="cyclic"
        )
    )
    d_alpha, d_u = find(samples_of(problem), jnp.asarray(alpha), jnp.asarray(u))
    after, ahead = passes_in_numpy(problem, alpha, u, 2, sigma=4.0)
    np.testing.assert_allclose(alpha + d_alpha, after, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(u + 4 * d_u, ahead, rtol=1e-10, atol=1e-12)
    x, _, weight = data()
    scale = weight / weight.sum() / 0.05
    np.testing.assert_allclose(d_u, x.T @ (scale * d_alpha), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES, ids=by_name)
def test_slope_and_curvature_of_the_dual(loss):
    y = jnp.array([1.0, -1.0, 1.0, -1.0])
    alpha = y * jnp.array([0.2, 0.3, 0.7, 0.9])
    slope = jax.vmap(jax.grad(lambda a, y: -loss.conjugate(a, y)))
    np.testing.assert_allclose(loss.dual_slope(alpha, y), slope(alpha, y), rtol=1e-12)
    bend = jax.vmap(jax.grad(lambda a, y: -loss.dual_slope(a, y)))
    np.testing.assert_allclose(loss.dual_curvature(alpha, y), bend(alpha, y), atol=1e-12)


def test_the_pass_is_one_kernel_on_a_cpu():
    problem = problem_of(hinge(), sparse=True)
    method = sdca()
    state = method.init(problem, problem.init())
    text = jax.jit(method.step).lower(problem, state).compile().as_text()
    entry = text[text.index("ENTRY") :]
    assert 'xla_cpu_small_call="true"' in entry
    assert "while(" not in entry


@pytest.mark.parametrize(
    ("loss", "penalty", "intercept", "message"),
    [
        (poisson(), l2(1.0), False, "no dual form.*can: .*lbfgs"),
        (hinge(), l1(1.0), False, "l1 is not strongly convex"),
        (hinge(), l2(0.0), False, "strength is 0"),
        (hinge(), l2(1.0), True, "column of ones"),
    ],
)
def test_refusals(loss, penalty, intercept, message):
    x, y, _ = data()
    y = y if loss.name != "poisson" else np.abs(y)
    problem = LinearProblem(x, y, loss, penalty, intercept=intercept)
    with pytest.raises(ValueError, match=message):
        solve(problem, sdca())


def test_arguments():
    with pytest.raises(ValueError, match="shrink"):
        sdca(replace=True, shrink=True)
    with pytest.raises(ValueError, match="seed"):
        sdca(seed=-1)
