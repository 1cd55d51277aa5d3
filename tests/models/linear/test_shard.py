"""Rows on a mesh: products, solvers that know nothing of it, and their bytes."""

import jax
import numpy as np
import pytest
import scipy.sparse

from jdml.models.linear import (
    LinearProblem,
    Weights,
    box,
    divide,
    l1,
    l2,
    logistic,
    multinomial,
    shard_problem,
    squared,
)
from jdml.optimize import newton_cg, newton_cholesky, proximal, solve
from jdml.partition import balanced_features, stratified
from jdml.sharding import bytes_per_axis, collectives, make_mesh

N, D = 61, 10


def problem_of(sparse=False, penalty=None, loss=None, intercept=True):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, D)) * (rng.random((N, D)) < 0.4)
    y = np.where(x @ rng.normal(size=D) + rng.normal(size=N) > 0, 1, -1)
    y = y if loss is None or loss.num_outputs is None else rng.integers(0, 3, N)
    x = scipy.sparse.csr_array(x) if sparse else x
    weight = rng.random(N) + 0.1
    return LinearProblem(x, y, loss or logistic(), penalty or l2(0.05), weight, intercept)


def mesh_of(**shape):
    num = int(np.prod(list(shape.values())))
    return make_mesh(shape, devices=jax.devices()[:num])


DIVISIONS = [(4, 1), (1, 4), (2, 3)]


@pytest.mark.parametrize(
    "grid",
    [*(pytest.param(g, marks=pytest.mark.slow) for g in DIVISIONS[:2]), DIVISIONS[2], (1, 1)],
    ids=str,
)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_simulated_workers_have_the_same_problem(grid, sparse):
    loss = multinomial(3) if grid == (2, 3) else None
    whole = problem_of(sparse, loss=loss)
    divided = divide(whole, *grid)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda p: rng.normal(size=p.shape), whole.init())
    _, wide = divided.rows.shape
    padding = ((0, wide - D),) + ((0, 0),) * (params.w.ndim - 1)
    both = jax.jit(lambda problem, params: problem.value_and_gradient(params))
    value, gradient = both(divided, params._replace(w=np.pad(params.w, padding)))
    expected, slope = both(whole, params)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_allclose(gradient.w[:D], slope.w, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(gradient.b, slope.b, rtol=1e-10, atol=1e-14)
    assert not np.asarray(gradient.w[D:]).any()
    heavy = np.asarray(divided.sample_weight) > 0
    squared_norms = jax.jit(lambda problem: problem.rows.squared_norms())
    np.testing.assert_allclose(
        np.sort(squared_norms(divided)[heavy]), np.sort(squared_norms(whole))
    )


@pytest.mark.parametrize(
    ("grid", "sparse"),
    [
        ((2, 3), True),
        pytest.param((4, 1), False, marks=pytest.mark.slow),
        *(
            pytest.param(grid, sparse, marks=pytest.mark.slow)
            for grid, sparse in [((4, 1), True), ((1, 4), False), ((1, 4), True), ((2, 3), False)]
        ),
    ],
    ids=str,
)
def test_equal_answers_however_it_is_divided(grid, sparse):
    mesh = mesh_of(data=grid[0], model=grid[1])
    axes = tuple(name if size > 1 else None for name, size in zip(mesh.shape, grid, strict=True))
    problem = problem_of(sparse)
    alone = solve(problem, newton_cg(), 1e-8, progress=False)
    found = solve(shard_problem(problem, mesh, *axes), newton_cg(), 1e-8, progress=False)
    assert found.num_steps == alone.num_steps
    assert found.value == pytest.approx(alone.value, rel=1e-12)
    np.testing.assert_allclose(found.params.w[:D], alone.params.w, rtol=1e-8, atol=1e-9)


@pytest.mark.slow
def test_a_prox_and_a_hessian_on_eight_workers():
    mesh = mesh_of(data=8)
    for problem, method in (
        (problem_of(penalty=l1(0.05)), proximal()),
        (problem_of(True, loss=squared()), newton_cholesky()),
    ):
        alone = solve(problem, method, 1e-8, progress=False)
        found = solve(shard_problem(problem, mesh, "data"), method, 1e-8, progress=False)
        assert found.value == pytest.approx(alone.value, rel=1e-11)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize(
    ("axes", "numbers"), [(("data", None), D), ((None, "data"), N)], ids=["sample", "feature"]
)
def test_bytes_of_a_pass(axes, numbers, sparse):
    # Xᵀv sends the columns' sums, X w the samples' margins; between two all-reduce sends it once.
    mesh = mesh_of(data=2)
    problem = shard_problem(problem_of(sparse, intercept=False), mesh, *axes)

    def one_pass(problem, w):
        margins = problem.margins(w)
        return margins, problem.pull(problem.slopes(margins))

    compiled = jax.jit(one_pass).lower(problem, problem.init()).compile()
    sums = [c for c in collectives(compiled, mesh) if c.kind == "all-reduce"]
    assert bytes_per_axis(sums) == {("data",): 8 * numbers}


def test_parts_of_samples_are_taken_as_they_are():
    problem = problem_of()
    parts = stratified(np.asarray(problem.y), 3)
    divided = divide(problem, 3, parts=parts)
    places = divided.rows.parts(divided.y)
    counts = [int((np.asarray(p)[: len(q)] > 0).sum()) for p, q in zip(places, parts, strict=True)]
    assert max(counts) - min(counts) <= 1
    assert float(divided.value(problem.init())) == pytest.approx(
        float(problem.value(problem.init()))
    )


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_columns_are_taken_as_they_are_and_put_back_in_order(sparse):
    whole = problem_of(sparse)
    nonzeros = np.array([9, 1, 1, 1, 1, 1, 1, 1, 1, 1])
    parts = balanced_features(nonzeros, 2)
    assert sorted(map(len, parts)) == [1, 9]  # what is divided is the non-zeros
    divided = divide(whole, 2, 2, feature_parts=parts)
    assert divided.rows.shape == (N + 1, 18)
    w = np.arange(1.0, 11)
    columns = np.asarray(divided.rows.columns).ravel()
    placed = np.where(columns < 0, 0, w[columns])
    np.testing.assert_array_equal(divided.rows.in_order(placed), w)
    both = jax.jit(lambda problem, params: problem.value_and_gradient(params))
    value, gradient = both(divided, Weights(placed, np.float64(0.3)))
    expected, slope = both(whole, Weights(w, np.float64(0.3)))
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_allclose(divided.rows.in_order(gradient.w), slope.w, rtol=1e-10, atol=1e-14)
    plain = divide(whole, features=4)  # of 10 columns: two are added, after the last
    np.testing.assert_array_equal(plain.rows.in_order(np.arange(12)), np.arange(10))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: shard_problem(p, mesh_of(data=2)), "neither samples nor features"),
        (lambda p: shard_problem(p, mesh_of(data=2), "rows"), "no axis 'rows'"),
        (lambda p: shard_problem(p, mesh_of(data=2, model=2), "data"), r"axes \['model'\] divide"),
        (lambda p: divide(p, "data"), "give the mesh"),
        (lambda p: divide(p, 2, mesh=mesh_of(data=2)), "its axes"),
        (lambda p: divide(p, 0), "at least one"),
        (lambda p: divide(p, 62), "62 workers and 61 rows"),
        (lambda p: divide(p, 1, 11), "11 workers and 10 columns"),
        (lambda p: divide(p, 2, parts=[[0], [1]]), "each of 61 rows"),
        (lambda p: divide(p, 1, 2, feature_parts=[[0, 1], [2, -1]]), "each of 10 columns"),
        (lambda p: divide(divide(p, 2), 2), "not divided yet"),
        (lambda p: divide(p.replace(penalty=box(1, 2)), 1, 4), "columns of zeros"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make(problem_of())
