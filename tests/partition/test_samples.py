"""The order of samples: complete, deterministic, resumable, shared out over processes."""

import json

import numpy as np
import pytest

from jdml.partition.samples import Sampler, permutation, process_rows


def test_no_sample_twice_in_an_epoch_and_all_but_the_remainder_seen():
    sampler = Sampler(23, 4, seed=3)
    for _ in range(3):
        seen = np.concatenate([next(sampler) for _ in range(sampler.batches_per_epoch)])
        assert seen.size == 20
        assert np.unique(seen).size == 20
        assert seen.min() >= 0
        assert seen.max() < 23
    assert sampler.epoch == 3


def test_epochs_drop_different_samples():
    sampler = Sampler(5, 4, seed=0)
    dropped = {({0, 1, 2, 3, 4} - set(next(sampler).tolist())).pop() for _ in range(30)}
    assert dropped == {0, 1, 2, 3, 4}


def test_seeds_and_epochs_give_different_orders_and_the_same_ones_again():
    first = permutation(100, 7, 0)
    assert np.array_equal(first, permutation(100, 7, 0))
    assert not np.array_equal(first, permutation(100, 7, 1))
    assert not np.array_equal(first, permutation(100, 8, 0))
    # (seed, epoch) is a key, not a sum.
    assert not np.array_equal(permutation(100, 1, 2), permutation(100, 2, 1))


def test_the_order_is_the_one_of_every_earlier_run():
    # Fixed numbers: a NumPy that draws another permutation would break every resume.
    assert permutation(8, 0, 0).tolist() == [5, 0, 6, 1, 7, 2, 4, 3]
    assert permutation(8, 2**64 - 1, 5).tolist() == [7, 5, 1, 2, 4, 0, 3, 6]


def test_without_shuffle_samples_come_in_order():
    sampler = Sampler(7, 3, shuffle=False)
    assert [next(sampler).tolist() for _ in range(3)] == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]


@pytest.mark.parametrize("stop", [0, 1, 4, 5, 6, 11])
def test_a_resumed_sampler_goes_on_exactly(stop):
    whole = Sampler(23, 4, seed=9)
    expected = [next(whole) for _ in range(20)]
    first = Sampler(23, 4, seed=9)
    got = [next(first) for _ in range(stop)]
    second = Sampler(23, 4, seed=9)
    second.restore(json.loads(json.dumps(first.state())))
    got += [next(second) for _ in range(20 - stop)]
    assert np.array_equal(got, expected)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_processes_share_the_global_batch_whatever_their_number(count):
    whole = Sampler(50, 8, seed=1)
    parts = [Sampler(50, 8, seed=1, rows=process_rows(8, i, count)) for i in range(count)]
    for _ in range(15):
        assert np.array_equal(np.concatenate([next(p) for p in parts]), next(whole))
    # So a state moves between numbers of processes.
    assert all(part.state() == whole.state() for part in parts)


def test_batch_at_moves_nothing():
    sampler = Sampler(23, 4, seed=2)
    expected = [Sampler(23, 4, seed=2).batch_at(s) for s in range(12)]
    for step in (11, 0, 7, 3):
        assert np.array_equal(sampler.batch_at(step), expected[step])
    assert sampler.step == 0
    assert np.array_equal(next(sampler), expected[0])


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (Sampler(23, 4, seed=1), "seed: saved 0, here 1"),
        (Sampler(24, 4), "num_samples: saved 23, here 24"),
        (Sampler(23, 2), "batch: saved 4, here 2"),
        (Sampler(23, 4, shuffle=False), "shuffle: saved 1, here 0"),
    ],
)
def test_a_state_of_another_order_is_refused(other, named):
    sampler = Sampler(23, 4)
    next(sampler)
    with pytest.raises(ValueError, match=named):
        other.restore(sampler.state())
    assert other.step == 0


def test_every_difference_is_named():
    with pytest.raises(ValueError, match=r"batch: .*num_samples: .*seed: "):
        Sampler(30, 5, seed=1).restore(Sampler(23, 4).state())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"step": -1}, "step: saved -1"),
        ({"step": True}, "step: saved True"),
        ({"step": "3"}, "step: saved '3'"),
        ({"order": 1}, "order: saved 1"),
        ({"world": 2}, r"world: saved 2, here '\(nothing\)'"),
    ],
)
def test_a_damaged_state_is_refused(change, named):
    sampler = Sampler(23, 4)
    with pytest.raises(ValueError, match=named):
        sampler.restore({**sampler.state(), **change})


def test_a_missing_key_is_named():
    sampler = Sampler(23, 4)
    state = sampler.state()
    del state["seed"]
    with pytest.raises(ValueError, match="seed: saved"):
        sampler.restore(state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 3, "batch": 4}, "3 samples do not fill one batch of 4"),
        ({"num_samples": 3, "batch": 0}, "batch must be at least 1"),
        ({"num_samples": 3, "batch": 1, "seed": -1}, "seed must lie in"),
        ({"num_samples": 3, "batch": 1, "seed": 2**64}, "seed must lie in"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Sampler(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((6, 0, 4), "does not divide over 4 processes"), ((8, 2, 2), "process 2 of 2")],
)
def test_bad_process_rows(arguments, message):
    with pytest.raises(ValueError, match=message):
        process_rows(*arguments)
