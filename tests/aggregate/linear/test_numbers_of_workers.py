"""Equal answers on 1, 2, 4 and 8 workers, whichever way a linear model is divided."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdml.aggregate.linear import (
    LocalSDCA,
    cocoa,
    consensus,
    dane,
    feature_cocoa,
    gauss_seidel,
    giant,
    jacobi,
    sharing,
)
from jdml.models.linear import LinearProblem, divide, l2, logistic, shard_problem
from jdml.optimize import lbfgs, newton_cg, newton_cholesky, solve
from jdml.sharding import make_mesh

LAM = 0.1
WORKERS = (1, 2, 4, 8)


def mesh_of(**shape):
    return make_mesh(shape, devices=jax.devices()[: np.prod(list(shape.values()))])


@functools.cache
def problem():
    """Numbers that no number of workers divides, so that there are rows and columns of zeros."""
    random = np.random.default_rng(0)
    x = random.normal(size=(61, 10))
    y = np.where(x @ random.normal(size=10) + random.normal(size=61) > 0, 1.0, -1.0)
    return LinearProblem(x, y, logistic(), l2(LAM))


@functools.cache
def least():
    found = solve(problem(), newton_cholesky(), 1e-13, progress=False)
    return found.value, np.asarray(found.params.w)


def by_sample(num):
    return divide(problem(), "data", mesh=mesh_of(data=num))


def by_feature(num):
    return divide(problem(), features="model", mesh=mesh_of(model=num))


def sharded(num):
    return shard_problem(problem(), mesh_of(data=num), "data")


def both_ways(num):
    shape = {"data": -(-num // 2), "model": min(num, 2)}
    return shard_problem(problem(), mesh_of(**shape), "data", "model")


# The gap bounds the distance from the minimum; |∇P|² / 2λ does.
GAP, SLOPE = 1e-11, 1e-7
FORMS = {
    "L-BFGS on sharded rows": (lbfgs(), sharded, SLOPE),
    "samples and features": (newton_cg(), both_ways, SLOPE),
    "consensus ADMM": (consensus(), by_sample, SLOPE),
    "CoCoA+": (cocoa(local=LocalSDCA(3)), by_sample, GAP),
    "CoCoA+ measured": (cocoa(sigma="measured", local=LocalSDCA(3)), by_sample, GAP),
    "CoCoA": (cocoa(gamma=None, local=LocalSDCA(3)), by_sample, GAP),
    "DANE": (dane(mu=0.1), by_sample, SLOPE),
    "GIANT": (giant(), by_sample, SLOPE),
    "feature CoCoA": (feature_cocoa(), by_feature, SLOPE),
    "Jacobi": (jacobi(local_steps=2), by_feature, SLOPE),
    "Gauss-Seidel": (gauss_seidel(local_steps=2), by_feature, SLOPE),
    "sharing ADMM": (sharing(), by_feature, SLOPE),
}


@functools.partial(jax.jit, static_argnums=0)
def answer(method, problem, tol):
    """``(w, objective, certificate)``; ``solve``'s loop as one program, which compiles faster."""

    def unfinished(carry):
        _, (_, certificate), number = carry
        return (certificate > tol) & (number < 5000)

    def more(carry):
        state = method.step(problem, carry[0])
        return state, method.measure(problem, state), carry[2] + 1

    state = method.init(problem, problem.init())
    first = state, method.measure(problem, state), jnp.zeros((), jnp.int32)
    state, (value, certificate), _ = jax.lax.while_loop(unfinished, more, first)
    return method.params(problem, state).w, value, certificate


FAST = ("samples and features", "CoCoA+", "feature CoCoA")
"""One by sample, one by feature, one by both; of each form four programs are compiled."""
EACH = [pytest.param(form, marks=() if form in FAST else pytest.mark.slow) for form in FORMS]


@pytest.mark.parametrize("form", EACH)
def test_equal_answers_on_any_number_of_workers(form):
    method, placed, tol = FORMS[form]
    value, weights = least()
    for num in WORKERS:
        w, found, certificate = jax.device_get(answer(method, placed(num), tol))
        assert certificate <= tol, num
        assert found == pytest.approx(value, rel=1e-8), num
        np.testing.assert_allclose(w[:10], weights, rtol=0, atol=2e-5, err_msg=str(num))
        assert not w[10:].any()
