"""Divisions of features and coordinates: non-zeros balanced, damping safe on a real Hessian."""

import itertools

import numpy as np
import pytest
import scipy.sparse

from jdml.partition import (
    balanced_features,
    contiguous_features,
    coordinate_blocks,
    nonzeros_of_columns,
    safe_damping,
    separability,
    visits,
)

RANDOM = np.random.default_rng(1)
COUNTS = (RANDOM.pareto(1.2, 200) * 10).astype(int)
MATRIX = scipy.sparse.random_array((60, 24), density=0.06, rng=RANDOM).tocsr()


def once(parts, num):
    return np.array_equal(np.sort(np.concatenate(parts)), np.arange(num))


@pytest.mark.parametrize("num_workers", [1, 3, 8, 200])
def test_every_column_goes_to_one_worker(num_workers):
    for parts in (
        contiguous_features(200, num_workers),
        contiguous_features(200, num_workers, COUNTS),
        balanced_features(COUNTS, num_workers),
        coordinate_blocks(200, num_workers),
        coordinate_blocks(200, num_workers, seed=3),
    ):
        assert len(parts) == num_workers
        assert once(parts, 200)
        assert min(map(len, parts)) >= 1
        assert all(np.all(np.diff(part) > 0) for part in parts)
    sizes = [len(b) for b in coordinate_blocks(200, num_workers, seed=3)]
    assert max(sizes) - min(sizes) <= 1


def test_nonzeros_are_balanced_within_a_column():
    counts = np.minimum(COUNTS, 50)
    for num_workers in (2, 5, 16):
        loads = [counts[p].sum() for p in balanced_features(counts, num_workers)]
        assert max(loads) - min(loads) <= counts.max()
        blocks = contiguous_features(200, num_workers, counts)
        assert max(counts[p].sum() for p in blocks) < counts.sum() / num_workers + counts.max() + 1


def test_grahams_bound_against_the_best_of_all_divisions():
    for seed in range(8):
        counts = np.random.default_rng(seed).integers(1, 30, 8)
        best = min(
            max(counts[np.array(owner) == k].sum() for k in range(3))
            for owner in itertools.product(range(3), repeat=8)
        )
        fullest = max(counts[p].sum() for p in balanced_features(counts, 3))
        assert best <= fullest <= (4 / 3 - 1 / 9) * best


def test_empty_columns_even_out_the_counts():
    parts = balanced_features([9, 1, 1, 1, 1, 0, 0, 0, 0, 0], 2)
    assert [len(p) for p in parts] == [5, 5]
    assert [len(p) for p in balanced_features(np.zeros(7), 3)] == [3, 2, 2]


def test_nonzeros_are_counted():
    dense = MATRIX.toarray()
    expected = (dense != 0).sum(axis=0)
    for rows in (dense, MATRIX, MATRIX.tocsc()):
        assert nonzeros_of_columns(rows).tolist() == expected.tolist()


def test_separability_counts_blocks_that_meet_in_a_sample():
    blocks = coordinate_blocks(24, 6)
    dense = MATRIX.toarray() != 0
    expected = max(sum(dense[i, b].any() for b in blocks) for i in range(60))
    assert separability(MATRIX, blocks) == separability(MATRIX.toarray(), blocks) == expected
    assert separability(np.ones((3, 24)), blocks) == 6
    assert separability(np.kron(np.eye(6), np.ones((2, 4))), blocks) == 1


def test_all_blocks_at_once_descend_with_the_damping():
    """XᵀX <= ω blockdiag(XᵀX), so that a step of 1/ω times the blocks' own minimisers descends."""
    blocks = coordinate_blocks(24, 6)
    omega = separability(MATRIX, blocks)
    assert 1 < omega < 6
    hessian = (MATRIX.T @ MATRIX).toarray()
    of_blocks = np.zeros_like(hessian)
    for b in blocks:
        of_blocks[np.ix_(b, b)] = hessian[np.ix_(b, b)]
    assert np.linalg.eigvalsh(of_blocks / safe_damping(omega, 6) - hessian).min() > -1e-10
    assert safe_damping(omega, 6) == 1 / omega

    x, y = MATRIX.toarray(), RANDOM.standard_normal(60)
    ridge = hessian + 1e-3 * np.eye(24)
    w, values = np.zeros(24), []
    for _ in range(50):
        values.append(np.sum((x @ w - y) ** 2) + 1e-3 * np.sum(w**2))
        gradient = ridge @ w - x.T @ y
        step = np.zeros(24)
        for b in blocks:
            step[b] = -np.linalg.solve(ridge[np.ix_(b, b)], gradient[b])
        w = w + safe_damping(omega, 6) * step
    assert np.all(np.diff(values) <= 1e-12)
    assert values[-1] < values[0]


def test_damping_between_one_block_and_all():
    assert safe_damping(4, 10, 1) == 1
    assert safe_damping(1, 10) == 1
    assert safe_damping(1, 1) == 1
    assert safe_damping(4, 10, 4) == pytest.approx(1 / 2)


def test_visits():
    assert visits(4, epoch=7).tolist() == [0, 1, 2, 3]
    orders = [visits(5, epoch, seed=2, order="permuted") for epoch in range(10)]
    assert all(sorted(o.tolist()) == list(range(5)) for o in orders)
    assert len({tuple(o.tolist()) for o in orders}) > 1
    assert np.array_equal(orders[3], visits(5, 3, seed=2, order="permuted"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: contiguous_features(3, 4), "4 workers and 3 features"),
        (lambda: balanced_features([1, 2], 3), "3 workers and 2 features"),
        (lambda: balanced_features([[1, 2]], 1), r"shape \(1, 2\)"),
        (lambda: balanced_features([1, -1], 1), "weight -1.0"),
        (lambda: coordinate_blocks(3, 4), "4 workers and 3 coordinates"),
        (lambda: separability(np.ones((2, 3)), [np.array([0, 1])]), "each of 3 columns"),
        (lambda: separability(np.ones((2, 3)), [np.array([0, 1, 1])]), "each of 3 columns"),
        (lambda: safe_damping(5, 4), "omega=5"),
        (lambda: safe_damping(0, 4), "omega=0"),
        (lambda: visits(3, 0, order="random"), "order='random'"),
        (lambda: visits(0, 0), "num_blocks=0"),
        (lambda: nonzeros_of_columns(np.zeros(3)), r"shape \(3,\)"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
