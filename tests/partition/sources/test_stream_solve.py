"""A problem on a stream is solved like one in memory; methods of single rows say what to take."""

import numpy as np
import pytest
import scipy.sparse

from jdml.models.linear import LinearProblem, l2, logistic
from jdml.optimize import newton_cholesky, solve, svrg
from jdml.partition.sources import ArrayStream, StreamedRows

RANDOM = np.random.default_rng(0)
X = scipy.sparse.random_array((300, 6), density=0.4, rng=RANDOM).tocsr().astype(np.float32)
Y = np.where(X @ RANDOM.standard_normal(6) + 0.5 * RANDOM.logistic(size=300) > 0, 1, -1)


def problem(rows):
    return LinearProblem(rows, Y, logistic(), l2(0.01), intercept=True)


@pytest.mark.usefixtures("compiled_lightly")
def test_newtons_method_with_its_gram_matrices():
    rows = StreamedRows(ArrayStream(X, Y, chunk_rows=70))
    streamed, whole = (
        solve(problem(x), newton_cholesky(), tol=1e-4, progress=False) for x in (rows, X)
    )
    assert streamed.converged
    assert streamed.num_steps == whole.num_steps > 1
    assert streamed.value == pytest.approx(whole.value, rel=1e-6)
    np.testing.assert_allclose(streamed.params.w, whole.params.w, atol=1e-4)


def test_a_method_of_single_rows_is_refused():
    rows = StreamedRows(ArrayStream(X, Y, chunk_rows=70))
    with pytest.raises(ValueError, match="no single rows or columns can be taken"):
        solve(problem(rows), svrg(), progress=False)
