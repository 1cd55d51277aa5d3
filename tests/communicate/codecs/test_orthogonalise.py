import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdml.communicate.codecs.orthogonalise import orthonormal_rows, unit_rows


def orthonormalised(*matrices, batch=0):
    """As f64, in one call."""
    given = [jnp.asarray(p, jnp.float32) for p in matrices]
    out = jax.jit(lambda ps: orthonormal_rows(ps, [batch] * len(ps)))(given)
    return [np.asarray(p, np.float64) for p in out]


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def lost(p, q):
    """What the span of the rows of ``q`` lacks of the rows of ``p``, as part of each."""
    p = np.asarray(np.asarray(p, np.float32), np.float64)
    missing = p - p @ q.T @ q
    return (np.linalg.norm(missing, axis=1) / np.linalg.norm(p, axis=1)).max()


@pytest.mark.parametrize("condition", [1, 1e2, 1e4, 1e5])
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_rows_are_orthonormal_and_span_the_same(rank, condition):
    turn = np.linalg.qr(gaussian(rank, rank))[0]
    base = np.linalg.qr(gaussian(500, rank))[0].T
    p = (turn * np.geomspace(1, 1 / condition, rank)) @ base
    (q,) = orthonormalised(p)
    np.testing.assert_allclose(q @ q.T, np.eye(rank), atol=2e-6)
    assert lost(p, q) < 2e-5


def test_matrices_of_different_lengths_and_stacks_do_not_touch_each_other():
    one, two = gaussian(3, 4, 50), gaussian(3, 4, 5, 7, seed=1)
    two[1] = np.nan
    q_one, q_two = orthonormalised(one, two, batch=1)
    for i in range(3):
        np.testing.assert_allclose(q_one[i], orthonormalised(one[i])[0], atol=1e-5)
    for i in (0, 2):
        flat = q_two[i].reshape(4, -1)
        np.testing.assert_allclose(flat @ flat.T, np.eye(4), atol=1e-5)
    assert np.isnan(q_two[1]).all()


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_dependent_rows_leave_a_projection(rank):
    p = gaussian(4, rank) @ gaussian(rank, 64, seed=1)
    (q,) = orthonormalised(p)
    values = np.linalg.eigvalsh(q @ q.T)
    # What rounding leaves of a dependent row is as small as 1e-7 and known to 1e-3 of itself.
    assert (np.minimum(np.abs(values), np.abs(values - 1)) < 1e-3).all()
    if rank:
        assert lost(p, q) < 1e-5
    else:
        assert not q.any()


def test_equal_rows_count_once():
    (q,) = orthonormalised(np.repeat(np.eye(2, 9), 2, axis=0))
    np.testing.assert_allclose(q, np.diag([1, 0, 1, 0])[:, [0, 2]] @ np.eye(2, 9), atol=1e-6)


@pytest.mark.parametrize("scale", [1e38, 1e30, 1e-30])
def test_any_scale(scale):
    p = gaussian(4, 64)
    np.testing.assert_allclose(orthonormalised(p * scale)[0], orthonormalised(p)[0], atol=1e-5)
    rows = np.asarray(unit_rows(jnp.asarray(p * scale, jnp.float32), 0))
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_seen_everywhere(bad):
    p = gaussian(4, 64)
    p[2, 3] = bad
    assert np.isnan(orthonormalised(p)[0]).all()


def test_unit_rows_of_zeros_are_zeros():
    assert not np.any(unit_rows(jnp.zeros((2, 3, 5)), 1))
