"""Dual Newton and SDNA against scikit-learn's and SDCA's optimum, and their limit cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

from jdml.models.linear import (
    LinearProblem,
    elastic_net,
    hinge,
    l2,
    logistic,
    smoothed_hinge,
    squared,
    squared_hinge,
)
from jdml.optimize import solve
from jdml.optimize.dual import dual_newton, sdca, sdna
from jdml.optimize.dual.ascent import samples_of
from jdml.optimize.dual.sdna import maximise_block

LOSSES = [squared(), logistic(), hinge(), squared_hinge(), smoothed_hinge(0.5)]
N, D = 60, 7


def by_name(loss):
    return loss.name


def problem_of(loss, penalty=None, sparse=False):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, D)) * (rng.random((N, D)) < 0.6)
    y = np.where(x @ rng.normal(size=D) + 0.5 * rng.normal(size=N) > 0, 1.0, -1.0)
    x = scipy.sparse.csr_array(x) if sparse else x
    return LinearProblem(x, y, loss, penalty or l2(0.05), sample_weight=rng.random(N) + 0.1)


@pytest.mark.parametrize("loss", LOSSES, ids=by_name)
def test_dual_newton_takes_few_steps_and_never_falls(loss):
    found = solve(problem_of(loss), dual_newton(), 1e-11, 40, check_every=1, progress=False)
    assert found.converged
    dual = found.history.values - found.history.certificates
    assert (np.diff(dual) >= -1e-13).all()


@pytest.mark.parametrize("lam", [1e-3, 0.1])
def test_a_block_of_more_samples_than_columns_is_maximised(lam):
    # The hinge has no curvature of its own, and the block's kernel is singular.
    problem = problem_of(hinge(), l2(lam))
    found = solve(problem, sdna(block=N), 1e-9, 5, check_every=1, progress=False)
    assert found.converged


@pytest.mark.parametrize("loss", LOSSES, ids=by_name)
def test_sdna_reaches_the_same_objective(loss):
    problem = problem_of(loss)
    found = solve(problem, sdna(block=16), 1e-10, 400, check_every=1, progress=False)
    assert found.converged
    dual = found.history.values - found.history.certificates
    assert (np.diff(dual) >= -1e-13).all()
    other = solve(problem, dual_newton(), 1e-11, 40, check_every=1, progress=False)
    np.testing.assert_allclose(found.value, other.value, rtol=1e-8)


@pytest.mark.parametrize("method", [dual_newton(), sdna(block=16)], ids=["newton", "sdna"])
def test_elastic_nets_and_sparse_rows(method):
    dense, sparse = (
        solve(
            problem_of(squared_hinge(), elastic_net(0.02, 0.05), kind),
            method, 1e-10, 200, check_every=1, progress=False,
        )
        for kind in (False, True)
    )  # fmt: skip
    assert dense.converged
    assert sparse.converged
    np.testing.assert_allclose(sparse.params.w, dense.params.w, atol=1e-5)


def test_a_block_of_all_samples_is_solved_in_one_step():
    found = solve(problem_of(squared()), sdna(block=N), 0.0, 1, progress=False)
    assert found.certificate < 1e-12


def test_dual_newton_is_superlinear():
    found = solve(problem_of(squared()), dual_newton(), 1e-13, 8, check_every=1, progress=False)
    assert found.converged
    gaps = found.history.certificates
    factors = gaps[1:] / gaps[:-1]
    # Each step gains more digits than the one before.
    assert factors[-1] < 1e-4
    assert (factors[1:] < factors[:-1]).all()


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss.name != "logistic"], ids=by_name)
def test_a_block_of_one_is_a_coordinate_step(loss):
    problem = problem_of(loss)
    samples = samples_of(problem)
    rng = np.random.default_rng(1)
    alpha = problem.y * jnp.asarray(rng.random(N))
    u = jnp.asarray(rng.normal(size=D))
    whole = samples.rows

    def one(i):
        block = samples._replace(
            rows=whole.take(i[None]), y=samples.y[i][None], scale=samples.scale[i][None],
            q=samples.q[i][None],
        )  # fmt: skip
        new = maximise_block(loss, block, problem.sample_weight[i][None], alpha[i][None], u)
        return new[0] - alpha[i]

    expected = loss.dual_step(whole.matvec(u), samples.q, alpha, samples.y)
    np.testing.assert_allclose(jax.jit(jax.vmap(one))(jnp.arange(N)), expected, atol=1e-6)


def test_fewer_passes_than_sdca_where_samples_are_alike():
    # Qu et al., figure 1: correlated samples.
    rng = np.random.default_rng(3)
    x = rng.normal(size=(N, 1)) * np.ones(D) + 0.1 * rng.normal(size=(N, D))
    problem = LinearProblem(x, np.sign(x[:, 0]), squared(), l2(1e-3))
    passes = [
        solve(problem, method, 1e-8, 3000, check_every=1, progress=False).num_steps
        for method in (sdca(), sdna(block=20))
    ]
    assert passes[1] < passes[0] / 3


def test_refusals():
    with pytest.raises(ValueError, match="60 samples"):
        solve(problem_of(squared()), sdna(block=61))
    with pytest.raises(ValueError, match="block=0"):
        sdna(block=0)
    with pytest.raises(ValueError, match="inner_steps=0"):
        dual_newton(0)
