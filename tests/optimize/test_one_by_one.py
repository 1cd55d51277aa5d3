"""Methods of single samples or columns are refused where each would be fetched from elsewhere."""

import re

import jax
import numpy as np
import optax
import pytest
import scipy.sparse

from jdml.models.linear import LinearProblem, divide, l2, logistic, shard_problem
from jdml.optimize import (
    coordinate_descent,
    cyclic_dual_ascent,
    methods_for,
    newton_cholesky,
    quasi_newton,
    saga,
    sdca,
    sdna,
    sgd,
    solve,
    svrg,
)
from jdml.partition.sources import ArrayStream, StreamedRows
from jdml.sharding import make_mesh

RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((24, 4)) * (RANDOM.random((24, 4)) < 0.7)
Y = np.where(RANDOM.random(24) < 0.5, 1.0, -1.0)
SINGLE = [
    *(sgd(optax.sgd(0.1)), saga(), svrg(), quasi_newton(2, 2), coordinate_descent()),
    *(sdca(), cyclic_dual_ascent(), sdna(2)),
]
NAMES = {method.name for method in SINGLE}
WHOLE = {"accelerated", "dual_newton", "gradient_descent", "lbfgs", "newton_cg", "proximal"}


def problem_of(sparse=False):
    return LinearProblem(scipy.sparse.csr_array(X) if sparse else X, Y, logistic(), l2(0.1))


@pytest.fixture(params=["dense by sample", "dense by feature", "sparse by both"])
def on_a_mesh(request):
    kind, way = request.param.split(" by ")
    shape = {"sample": {"data": 2}, "feature": {"model": 2}, "both": {"data": 2, "model": 2}}[way]
    mesh = make_mesh(shape, devices=jax.devices()[: 2 ** len(shape)])
    axes = ["data" if "data" in shape else None, "model" if "model" in shape else None]
    problem = shard_problem(problem_of(kind == "sparse"), mesh, *axes)
    return problem, ", ".join(map(repr, shape))


def test_over_a_mesh_the_axis_and_those_that_can_are_named(on_a_mesh):
    problem, axes = on_a_mesh
    for method in SINGLE:
        what = "columns" if method.name == "coordinate_descent" else "samples"
        message = f"{method.name} cannot .*{what} one by one.* mesh axis {re.escape(axes)}, so .*"
        with pytest.raises(ValueError, match=message + r"Methods that can: .*lbfgs, newton_cg"):
            solve(problem, method, progress=False)
    able = set(methods_for(problem))
    assert not able & NAMES
    assert able >= WHOLE


def test_the_same_rows_on_one_device_can_be_taken_one_by_one():
    mesh = make_mesh({"data": 1}, devices=jax.devices()[:1])
    alone = shard_problem(problem_of(), mesh, "data")
    for problem in (problem_of(), problem_of(sparse=True), alone):
        assert set(methods_for(problem)) >= NAMES


def test_blocks_of_simulated_workers():
    for method in SINGLE:
        with pytest.raises(ValueError, match="divided into 2 × 1 blocks"):
            solve(divide(problem_of(), 2), method, progress=False)


def test_streams():
    problem = problem_of().replace(rows=StreamedRows(ArrayStream(X, Y, chunk_rows=7)))
    for method in SINGLE:
        with pytest.raises(ValueError, match=r"of a stream; .*Batches"):
            solve(problem, method, progress=False)


def test_a_hessian_of_blocks_of_columns():
    with pytest.raises(ValueError, match=r"newton_cholesky cannot .*divided by feature"):
        solve(divide(problem_of(), features=2), newton_cholesky(), progress=False)
