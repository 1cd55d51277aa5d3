"""A problem on a stream is solved like one in memory; methods of single rows say what to take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

from jdml.models.linear import LinearProblem, l2, logistic, multinomial
from jdml.optimize import newton_cg, newton_cholesky, solve, svrg
from jdml.partition.sources import ArrayStream, StreamedRows

RANDOM = np.random.default_rng(0)
X = scipy.sparse.random_array((300, 6), density=0.4, rng=RANDOM).tocsr().astype(np.float32)
Y = np.where(X @ RANDOM.standard_normal(6) + 0.5 * RANDOM.logistic(size=300) > 0, 1, -1)


def problem(rows):
    return LinearProblem(rows, Y, logistic(), l2(0.01), intercept=True)


def test_newtons_method_with_its_gram_matrices():
    rows = StreamedRows(ArrayStream(X, Y, chunk_rows=70))
    streamed, whole = (
        solve(problem(x), newton_cholesky(), tol=1e-4, progress=False) for x in (rows, X)
    )
    assert streamed.converged
    assert streamed.num_steps == whole.num_steps > 1
    assert streamed.value == pytest.approx(whole.value, rel=1e-6)
    np.testing.assert_allclose(streamed.params.w, whole.params.w, atol=1e-4)


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("loss", [logistic(), multinomial(3)], ids=lambda loss: loss.name)
def test_a_product_with_the_hessian_is_one_pass(sparse, loss):
    y = Y if loss.num_outputs is None else RANDOM.integers(0, 3, 300)
    x = X if sparse else X.toarray()
    rows = StreamedRows(ArrayStream(x, y, chunk_rows=70))  # the last chunk has 20 rows
    weight = RANDOM.random(300)
    streamed, whole = (
        LinearProblem(given, y, loss, l2(0.01), weight, intercept=True) for given in (rows, x)
    )
    change = jax.tree.map(lambda p: jnp.asarray(RANDOM.normal(size=p.shape), p.dtype), whole.init())
    margins = whole.margins(change)
    product = jax.jit(lambda problem: problem.curvature_product(margins, change))
    found = product(streamed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, product(whole))
    assert rows.num_passes == 1


def test_newtons_method_by_conjugate_gradients():
    rows = StreamedRows(ArrayStream(X, Y, chunk_rows=70))
    streamed, whole = (solve(problem(x), newton_cg(), tol=1e-4, progress=False) for x in (rows, X))
    assert streamed.converged
    assert streamed.value == pytest.approx(whole.value, rel=1e-6)


def test_a_method_of_single_rows_is_refused():
    rows = StreamedRows(ArrayStream(X, Y, chunk_rows=70))
    with pytest.raises(ValueError, match="no single rows or columns can be taken"):
        solve(problem(rows), svrg(), progress=False)
