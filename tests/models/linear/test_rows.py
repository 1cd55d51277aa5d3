"""Dense and sparse rows against NumPy; what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

from jdml.models.linear import packed as packed_module
from jdml.models.linear import rows as rows_module
from jdml.models.linear.rows import Dense, Sparse, as_rows

N, D = 45, 31


def skewed():
    """Rows and columns of 0, 1 and all non-zeros among the others."""
    random = np.random.default_rng(0)
    x = random.standard_normal((N, D)) * (random.random((N, D)) < 0.15)
    x[3], x[:, 4] = 0, 0
    x[7], x[:, 9] = random.standard_normal(D), random.standard_normal(N)
    x[11] = 0
    x[11, 30] = 2.0
    return x


X = skewed()


@pytest.fixture(params=["dense", "sparse", "sparse, transposed"])
def rows(request):
    if request.param == "dense":
        return as_rows(X)
    if request.param == "sparse":
        return as_rows(scipy.sparse.csr_array(X))
    return as_rows(scipy.sparse.coo_matrix(X.T)).T


def test_products(rows, monkeypatch):
    monkeypatch.setattr(rows_module, "GRAM_ROWS", 16)  # several blocks, the last not full
    assert rows.shape == (N, D)
    assert rows.dtype == np.float64
    random = np.random.default_rng(1)
    w, v, weights = random.standard_normal(D), random.standard_normal(N), random.random(N)
    several_w, several_v = random.standard_normal((D, 3)), random.standard_normal((N, 3))
    close = {"rtol": 1e-12, "atol": 1e-13}

    @jax.jit
    def all_of(rows):
        return (
            rows.matvec(w),
            rows.rmatvec(v),
            rows.matvec(several_w),
            rows.rmatvec(several_v),
            rows.squared_norms(),
            rows.gram(weights),
            rows.T.matvec(v),
        )

    expected = (
        X @ w, X.T @ v, X @ several_w, X.T @ several_v, (X**2).sum(1), (X.T * weights) @ X, X.T @ v
    )  # fmt: skip
    for found, wanted in zip(all_of(rows), expected, strict=True):
        np.testing.assert_allclose(found, wanted, **close)


def test_single_rows(rows):
    random = np.random.default_rng(2)
    w = random.standard_normal(D)
    samples = np.array([7, 3, 44, 11, 7])
    several_w, v = random.standard_normal((D, 3)), random.standard_normal(5)

    @jax.jit
    def all_of(rows, samples):
        taken = rows.take(samples)
        return (
            taken.matvec(w),
            taken.rmatvec(v),
            taken.matvec(several_w),
            taken.rmatvec(jnp.stack([v, v], axis=1))[:, 1],
            taken.squared_norms(),
            jax.vmap(rows.dot, (0, None))(samples, w),
            rows.add(w, samples[2], -2.0),
        )

    own = X[samples]
    expected = (
        own @ w, own.T @ v, own @ several_w, own.T @ v, (own**2).sum(1), own @ w, w - 2 * X[44]
    )  # fmt: skip
    for found, wanted in zip(all_of(rows, samples), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-13)


def test_sparse_keeps_about_its_non_zeros_alone():
    random = np.random.default_rng(3)
    matrix = scipy.sparse.random_array((2000, 700), density=0.01, rng=random, format="csr")
    found = as_rows(matrix)
    assert isinstance(found, Sparse)
    for packed in (found.by_row, found.by_column):
        stored = sum(values.size for _, values in packed.groups)
        assert matrix.nnz <= stored <= 1.5 * matrix.nnz
        assert packed.values.size == matrix.nnz + packed.width
    assert max(leaf.size for leaf in jax.tree.leaves(found)) < 2000 * 700 / 20


def test_groups_of_many_widths():
    """Rows of 0 to 300 non-zeros: loops over lines, rows reduced, groups joined."""
    random = np.random.default_rng(4)
    counts = np.concatenate([np.arange(301), np.full(200, 40), np.full(100, 21)])
    x = np.zeros((len(counts), 400))
    for row, count in zip(x, counts, strict=True):
        row[random.choice(400, count, replace=False)] = random.standard_normal(count)
    found = as_rows(scipy.sparse.csr_array(x))
    w, several = random.standard_normal(400), random.standard_normal((400, 2))
    np.testing.assert_allclose(found.matvec(w), x @ w, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(found.matvec(several), x @ several, rtol=1e-11, atol=1e-12)
    v = random.standard_normal(len(x))
    np.testing.assert_allclose(found.rmatvec(v), x.T @ v, rtol=1e-11, atol=1e-12)


def test_products_scatter_nothing():
    found = as_rows(scipy.sparse.csr_array(X))
    for method, vector in (("matvec", np.ones(D)), ("rmatvec", np.ones(N))):
        program = jax.make_jaxpr(lambda r, v, method=method: getattr(r, method)(v))(found, vector)
        assert "scatter" not in str(program)


def test_entries_given_twice_are_summed_and_dtypes_kept():
    twice = scipy.sparse.coo_array(([1.0, 2.0, 5.0], ([0, 0, 1], [1, 1, 0])), shape=(2, 2))
    np.testing.assert_array_equal(as_rows(twice).matvec(np.array([1.0, 10.0])), [30.0, 5.0])
    assert as_rows(X.astype(np.float32)).dtype == np.float32
    assert as_rows(scipy.sparse.csr_array(X.astype(np.float32))).dtype == np.float32
    assert as_rows(np.eye(2, dtype=int)).dtype == np.float64
    given = Dense(jnp.ones((2, 2)))
    assert as_rows(given) is given


def test_the_matrix_given_is_not_written_to_nor_kept():
    entries = np.array([0.0, 2.0, 3.0, 4.0]), np.array([3, 1, 1, 0]), np.array([0, 3, 4])
    untidy = scipy.sparse.csr_array(tuple(e.copy() for e in entries), shape=(2, 5))
    tidy = scipy.sparse.csr_array(np.diag([5.0, 0, 7]))
    of_untidy, of_tidy = as_rows(untidy), as_rows(tidy)
    for now, before in zip((untidy.data, untidy.indices, untidy.indptr), entries, strict=True):
        np.testing.assert_array_equal(now, before)
    untidy.data[:], tidy.data[:] = -1, -1
    np.testing.assert_array_equal(of_untidy.matvec(np.ones(5)), [5.0, 4.0])
    np.testing.assert_array_equal(of_tidy.matvec(np.ones(3)), [5.0, 0.0, 7.0])
    np.testing.assert_array_equal(of_tidy.rmatvec(np.ones(3)), [5.0, 0.0, 7.0])


def test_groups_packed_piece_by_piece_are_the_same(monkeypatch):
    matrix = scipy.sparse.random_array((300, 90), density=0.3, rng=np.random.default_rng(5))
    whole = as_rows(matrix)
    monkeypatch.setattr(packed_module, "AT_A_TIME", 700)
    jax.tree.map(np.testing.assert_array_equal, as_rows(matrix), whole)


def test_f64_wants_a_session_that_has_it():
    with jax.enable_x64(False):
        for x in (X, scipy.sparse.csr_array(X)):
            with pytest.raises(ValueError, match="jax_enable_x64"):
                as_rows(x)
        assert as_rows(np.eye(2, dtype=int)).dtype == np.float32


def test_refused():
    bad = X.copy()
    bad[5, 2], bad[30, 0], bad[30, 1] = np.nan, np.inf, np.nan
    for x in (bad, scipy.sparse.csr_array(bad)):
        with pytest.raises(ValueError, match=r"in 2 rows: 5, 30\."):
            as_rows(x)
    bad[:15] = np.nan
    with pytest.raises(ValueError, match=r"16 rows: 0, 1, .* 9, …"):
        as_rows(bad)
    for x in (np.ones(3), np.ones((2, 3, 4)), np.ones((0, 3)), scipy.sparse.csr_array((4, 0))):
        with pytest.raises(ValueError, match=r"expected \[samples, features\]"):
            as_rows(x)
    for x in (np.ones((2, 2), complex), np.array([["a", "b"]]), np.ones((2, 2), np.float16)):
        with pytest.raises(ValueError, match="expected float32 or float64"):
            as_rows(x)
