"""Divisions of samples: each sample once, sizes within one, labels and weights balanced."""

import numpy as np
import pytest

from jdml.partition import contiguous, shuffle_split, stratified, with_replacement
from jdml.partition.samples import permutation

LABELS = np.random.default_rng(0).choice(4, 103, p=[0.6, 0.3, 0.08, 0.02])

DIVISIONS = {
    "contiguous": lambda k: contiguous(103, k),
    "global": lambda k: shuffle_split(103, k, seed=5, epoch=3),
    "local": lambda k: shuffle_split(103, k, seed=5, epoch=3, reshuffle="local"),
    "stratified": lambda k: stratified(LABELS, k, seed=5),
}


@pytest.mark.parametrize("num_workers", [1, 2, 7, 64, 103])
@pytest.mark.parametrize("name", DIVISIONS)
def test_every_sample_goes_to_one_worker_and_sizes_differ_by_one(name, num_workers):
    parts = DIVISIONS[name](num_workers)
    assert len(parts) == num_workers
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(103))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert all(part.dtype == np.int64 for part in parts)


def test_contiguous_parts_are_in_order():
    assert [p.tolist() for p in contiguous(7, 3)] == [[0, 1, 2], [3, 4], [5, 6]]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("num_workers", [1, 2, 5, 40])
def test_weighted_blocks_weigh_alike(seed, num_workers):
    random = np.random.default_rng(seed)
    weights = random.pareto(1.5, 40) * (random.random(40) < 0.7)
    parts = contiguous(40, num_workers, weights)
    assert np.array_equal(np.concatenate(parts), np.arange(40))
    assert min(map(len, parts)) >= 1
    heaviest = max(weights[p].sum() for p in parts)
    assert heaviest <= weights.sum() / num_workers + weights.max() + 1e-12


def test_equal_weights_are_none():
    for weights in (np.ones(12), np.full(12, 0.1), np.zeros(12)):
        assert [p.tolist() for p in contiguous(12, 4, weights)] == [
            p.tolist() for p in contiguous(12, 4)
        ]


def test_one_heavy_sample_stands_alone():
    parts = contiguous(6, 3, [1, 1, 100, 1, 1, 1])
    assert [p.tolist() for p in parts] == [[0, 1], [2], [3, 4, 5]]


def test_a_global_reshuffle_moves_samples_and_a_local_one_does_not():
    first, later = (shuffle_split(103, 4, 9, epoch) for epoch in (0, 1))
    assert any(set(a) != set(b) for a, b in zip(first, later, strict=True))
    assert np.array_equal(np.concatenate(later), permutation(103, 9, 1))
    local = [shuffle_split(103, 4, 9, epoch, reshuffle="local") for epoch in range(3)]
    for parts in local[1:]:
        for mine, now in zip(local[0], parts, strict=True):
            assert set(mine) == set(now)
            assert not np.array_equal(mine, now)
    assert not np.array_equal(local[1][0], local[2][0])
    # Two workers do not reorder alike.
    ranks = [np.argsort(np.argsort(part))[:25] for part in local[1]]
    assert not np.array_equal(ranks[0], ranks[1])


def test_strata_are_within_one():
    for num_workers in (2, 5, 30):
        parts = stratified(LABELS, num_workers, seed=2)
        counts = np.array([np.bincount(LABELS[p], minlength=4) for p in parts])
        assert np.all(counts.max(axis=0) - counts.min(axis=0) <= 1)
    words = np.array(["no", "yes"])[LABELS % 2]
    assert sum(map(len, stratified(words, 3))) == 103


def test_draws_with_replacement_are_uniform_and_independent():
    parts = with_replacement(10, 3, seed=1, size=20_000)
    for part in parts:
        counts = np.bincount(part, minlength=10)
        # Chi-square with 9 degrees of freedom: 33.7 has probability 1e-4.
        assert np.sum((counts - 2000) ** 2 / 2000) < 33.7
    together = np.bincount(parts[0] * 10 + parts[1], minlength=100)
    assert np.sum((together - 200) ** 2 / 200) < 161.3  # 99 degrees of freedom, 1e-4
    assert [len(p) for p in with_replacement(11, 3)] == [4, 4, 3]
    assert not np.array_equal(*(with_replacement(10, 1, 1, e, 50)[0] for e in (0, 1)))


@pytest.mark.parametrize("name", ["global", "local", "stratified"])
def test_the_division_is_the_seeds(name):
    def made(seed):
        if name == "stratified":
            return np.concatenate(stratified(LABELS, 4, seed))
        return np.concatenate(shuffle_split(103, 4, seed, 1, reshuffle=name))

    assert np.array_equal(made(3), made(3))
    assert not np.array_equal(made(3), made(4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: contiguous(3, 4), "4 workers and 3 samples"),
        (lambda: shuffle_split(3, 4), "4 workers and 3 samples"),
        (lambda: stratified([1, 1, 2], 4), "4 workers and 3 samples"),
        (lambda: with_replacement(3, 4), "4 workers and 3 samples"),
        (lambda: contiguous(3, 0), "at least one worker"),
        (lambda: contiguous(3, 2, [1, 2]), r"shape \(2,\); expected \[3\]"),
        (lambda: contiguous(3, 2, [1, -2, 0]), r"weight -2.0 \(position 1\)"),
        (lambda: contiguous(3, 2, [1, 2, np.nan]), r"weight nan \(position 2\)"),
        (lambda: shuffle_split(9, 2, reshuffle="never"), "reshuffle='never'"),
        (lambda: shuffle_split(9, 2, epoch=-1), "epoch=-1"),
        (lambda: shuffle_split(9, 2, seed=-1), "seed=-1"),
        (lambda: stratified(np.zeros((3, 2)), 2), r"shape \(3, 2\)"),
        (lambda: with_replacement(3, 1, size=0), "size=0"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
