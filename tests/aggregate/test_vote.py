"""Votes: counted as by hand, ties settled as documented, the same on a mesh."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdml.aggregate import vote
from tests.aggregate.test_ensemble import over_mesh

CLASSES = 4


def by_hand(labels, weights):
    """The labels that lead, and whether anybody voted, for one sample."""
    tally = collections.Counter()
    for label, weight in zip(labels, weights, strict=True):
        if 0 <= label < CLASSES:
            tally[int(label)] += float(weight)
    most = max(tally.values(), default=0.0)
    return [c for c, n in sorted(tally.items()) if n == most] if most else []


@pytest.mark.parametrize("weighted", [False, True])
def test_equals_a_count_by_hand(weighted):
    rng = np.random.default_rng(0)
    labels = rng.integers(-1, CLASSES + 1, (5, 300))  # some of them no votes
    weights = rng.integers(1, 4, 5) if weighted else np.ones(5)
    given = weights.astype(np.float32) if weighted else None
    leaders = [by_hand(column, weights) for column in labels.T]
    assert {len(x) for x in leaders} >= {1, 2}

    lowest = vote(labels, 0, CLASSES, given)
    assert lowest.dtype == jnp.int32
    np.testing.assert_array_equal(lowest, [x[0] if x else -1 for x in leaders])
    abstaining = vote(labels.T, 1, CLASSES, given, ties="abstain")
    np.testing.assert_array_equal(abstaining, [x[0] if len(x) == 1 else -1 for x in leaders])
    drawn = np.asarray(vote(labels, 0, CLASSES, given, ties="random", key=jax.random.key(0)))
    assert all(label in (x or [-1]) for label, x in zip(drawn, leaders, strict=True))


def test_drawn_labels_are_even_and_the_keys():
    labels = np.repeat([[3], [1], [3], [1], [0]], 2000, axis=1)
    first, again, other = (
        np.asarray(vote(labels, 0, CLASSES, ties="random", key=jax.random.key(i)))
        for i in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert set(first) == {1, 3}
    # 2,000 fair draws: the deviation of the part is 1.1 %.
    assert (first == 1).mean() == pytest.approx(0.5, abs=0.05)


def test_ties_by_the_models_probabilities():
    """0 and 2 have two votes each; 1 has none, though the models together find it likeliest."""
    first, last = [0.45, 0.44, 0.11], [0.02, 0.44, 0.54]
    logits = np.log(np.array([first, first, last, last], np.float32))[:, None]
    assert vote(logits, 0).tolist() == [0]
    assert vote(logits, 0, ties="outputs").tolist() == [2]
    # Weights count in both: with these there is no tie.
    weights = np.array([2, 2, 1, 1], np.float32)
    assert vote(logits, 0, weights=weights, ties="outputs").tolist() == [0]


def test_sums_of_weights_that_differ_by_rounding_are_tied():
    """0.1 + 0.2 against 0.3: not equal in f32, whatever the order, and meant to be."""
    weights = np.array([0.1, 0.2, 0.3], np.float32) * np.float32(1.1)
    labels = np.array([[0], [0], [1]])
    np.testing.assert_array_equal(vote(labels, 0, 2, weights, ties="abstain"), [-1])
    np.testing.assert_array_equal(vote(1 - labels, 0, 2, weights, ties="abstain"), [-1])
    closer = np.array([0.1, 0.2, 0.301], np.float32)
    np.testing.assert_array_equal(vote(labels, 0, 2, closer, ties="abstain"), [1])


def test_logits_vote_for_their_largest():
    logits = np.random.default_rng(1).normal(size=(5, 7, CLASSES)).astype(np.float32)
    np.testing.assert_array_equal(vote(logits, 0), vote(logits.argmax(-1), 0, CLASSES))
    logits[2] = np.nan  # no vote; argmax alone would count one for label 0
    np.testing.assert_array_equal(
        vote(logits, 0), vote(np.delete(logits, 2, axis=0).argmax(-1), 0, CLASSES)
    )
    np.testing.assert_array_equal(
        vote(logits, 0, ties="outputs"), vote(np.delete(logits, 2, axis=0), 0, ties="outputs")
    )
    logits[:, 3, 1] = np.nan
    assert vote(logits, 0)[3] == -1


@pytest.mark.parametrize(
    ("shape", "axis"),
    [({"data": 4, "model": 2}, "data"), ({"slice": 2, "data": 2}, ("slice", "data"))],
)
def test_over_a_mesh_axis(shape, axis):
    logits = np.random.default_rng(2).normal(size=(4, 6, CLASSES)).astype(np.float32)
    weights = np.array([1, 2, 1, 2], np.float32)
    key = jax.random.key(0)

    def all_of_them(x, w):
        labels = jnp.argmax(x, axis=-1)
        return (
            vote(x, axis),
            vote(labels, axis, CLASSES, w, "random", key),
            vote(x, axis, weights=w, ties="outputs"),
        )

    got, _ = over_mesh(all_of_them, shape, axis, logits, weights)
    expected = (
        vote(logits, 0),
        vote(logits.argmax(-1), 0, CLASSES, weights, "random", key),
        vote(logits, 0, weights=weights, ties="outputs"),
    )
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("ties", "times"), [("lowest", 1), ("outputs", 2)])
def test_bytes(ties, times):
    logits = np.zeros((4, 6, CLASSES), np.float32)
    _, sent = over_mesh(lambda x: vote(x, "data", ties=ties), {"data": 4}, "data", logits)
    assert sent == {("data",): times * 2 * 3 * 4 * 6 * CLASSES // 4}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: vote([np.zeros((6, 3)), np.zeros((6, 4))], 0), r"model 1 gives .*\[6, 4\]"),
        (lambda: vote(np.zeros((4, 6), int), 0), "num_classes=None"),
        (lambda: vote(np.zeros((4, 6), int), 0, 0), "num_classes=0"),
        (lambda: vote(np.zeros((4, 6, 3)), 0, 4), "the logits have 3"),
        (lambda: vote(np.zeros((4, 6), bool), 0, 2), "dtype bool"),
        (lambda: vote(np.zeros(4, np.float32), 0), "no dim of classes"),
        (lambda: vote(np.zeros((4, 6), int), 0, 3, ties="first"), "ties='first' is not one of"),
        (lambda: vote(np.zeros((4, 6), int), 0, 3, ties="random"), "pass key="),
        (lambda: vote(np.zeros((4, 6), int), 0, 3, ties="outputs"), "needs the models' logits"),
        (lambda: vote(np.zeros((4, 6), int), 0, 3, np.ones(6)), r"expected \(4,\)"),
        (lambda: vote(np.zeros((4, 6), int), "data", 3), "not bound"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
