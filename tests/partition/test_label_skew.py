"""Label-skewed divisions: every sample once, proportions as the Dirichlet distribution says."""

import math

import numpy as np
import pytest

from jdml.partition.label_skew import label_skew

LABELS = np.random.default_rng(0).integers(0, 10, 4000)


def shares(parts, labels=LABELS):
    """``[worker, label]``: which part of a label's samples each worker has."""
    counts = np.array([np.bincount(labels[p], minlength=10) for p in parts])
    return counts / counts.sum(axis=0)


@pytest.mark.parametrize("alpha", [0.05, 0.5, 10.0, math.inf])
@pytest.mark.parametrize("num_workers", [1, 3, 8])
def test_every_sample_goes_to_one_worker(alpha, num_workers):
    parts = label_skew(LABELS, num_workers, alpha, min_samples=16)
    assert len(parts) == num_workers
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(LABELS)))
    assert all(len(p) >= 16 and np.all(np.diff(p) > 0) for p in parts)


@pytest.mark.parametrize("alpha", [0.3, 1.0, 5.0])
def test_shares_have_the_variance_of_the_distribution(alpha):
    """A share of Dir_K(alpha) has mean 1/K and variance (1/K)(1 - 1/K) / (K alpha + 1)."""
    num_workers = 8
    drawn = np.concatenate(
        [shares(label_skew(LABELS, num_workers, alpha, seed)) for seed in range(60)]
    )
    expected = (1 / num_workers) * (1 - 1 / num_workers) / (num_workers * alpha + 1)
    assert drawn.mean() == pytest.approx(1 / num_workers)
    # 600 labels: the variance's own error is about 5 %, so 20 % is four deviations.
    assert drawn.var() == pytest.approx(expected, rel=0.2)


def test_an_infinite_alpha_divides_every_label_alike():
    counts = shares(label_skew(LABELS, 8, math.inf)) * np.bincount(LABELS)
    assert (counts.max(axis=0) - counts.min(axis=0)).max() < 1.5


def test_the_division_is_the_seeds():
    first, again, other = (label_skew(LABELS, 4, 0.5, seed) for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_labels_of_any_type():
    words = np.array(["a", "b", "c"])[LABELS % 3]
    parts = label_skew(words, 4, 0.5)
    assert sum(map(len, parts)) == len(words)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": LABELS.reshape(2, -1)}, "expected \\[num_samples\\]"),
        ({"num_workers": 0}, "at least one worker"),
        ({"min_samples": -1}, "no negative"),
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"alpha": math.nan}, "alpha=nan"),
        ({"labels": LABELS[:30], "min_samples": 4}, "30 samples are not 4 for each of 8"),
        ({"labels": np.zeros(64), "alpha": 0.01, "min_samples": 4}, "Take a larger alpha"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        label_skew(**{"labels": LABELS, "num_workers": 8, "alpha": 0.5} | arguments)
