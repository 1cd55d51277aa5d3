"""Offline sources: who draws which rows, without copies of the data, on threads and on a mesh."""

import threading
import tracemalloc

import numpy as np
import pytest
import scipy.sparse

from jdml.partition import contiguous, label_skew, shuffle_split
from jdml.partition.sources import Offline
from jdml.sharding import make_mesh

X = np.arange(41 * 3, dtype=np.float32).reshape(41, 3)
Y = np.arange(41) % 3
DATA = {"x": X, "y": Y}


def rows_of(source, worker, steps):
    return [np.arange(41)[source.rows(worker, s)] for s in steps]


@pytest.mark.parametrize("draws", ["global", "local"])
def test_an_epoch_is_the_shuffle_split(draws):
    source = Offline(DATA, 5, 4, seed=3, draws=draws)
    assert source.batches_per_epoch == 2
    for epoch in (0, 1, 4):
        parts = shuffle_split(41, 4, 3, epoch, reshuffle=draws)
        for k in (2, 0, 3, 1):
            drawn = np.concatenate(rows_of(source, k, range(2 * epoch, 2 * epoch + 2)))
            assert np.array_equal(drawn, parts[k][:10])


def test_own_parts_in_order_and_locally():
    parts = label_skew(Y, 4, 0.5, min_samples=4)
    smallest = min(map(len, parts))
    in_order = Offline(DATA, smallest, 4, draws="in order", parts=parts)
    assert np.array_equal(rows_of(in_order, 2, [0])[0], parts[2][:smallest])
    local = Offline(DATA, smallest, 4, draws="local", parts=parts)
    for k in range(4):
        drawn = np.concatenate(rows_of(local, k, range(30)))
        assert set(drawn) == set(parts[k])  # what one epoch leaves out, another has


def test_in_order_of_neighbours_nothing_is_copied():
    for source in (
        Offline(DATA, 5, 4, draws="in order"),
        Offline(DATA, 5, 4, draws="in order", parts=contiguous(41, 4)),
    ):
        batch = source(1, 0)
        assert np.shares_memory(batch["x"], X)
        assert np.array_equal(batch["x"], X[11:16])


def test_computation_parallelism_sees_all_the_data():
    source = Offline(DATA, 8, 3, seed=1, draws="replacement")
    drawn = [np.concatenate(rows_of(source, k, range(100))) for k in range(3)]
    assert all(set(d) == set(range(41)) for d in drawn)
    assert not np.array_equal(drawn[0], drawn[1])
    assert np.array_equal(source.rows(1, 17), source.rows(1, 17))
    own = Offline(DATA, 8, 3, draws="replacement", parts=contiguous(41, 3))
    assert set(np.concatenate(rows_of(own, 1, range(50)))) == set(contiguous(41, 3)[1])
    # More draws than samples are no error where each is drawn anew.
    assert len(Offline(DATA, 100, 1, draws="replacement").rows(0, 0)) == 100


def test_threads_allocate_batches_and_no_data():
    """Eight threads over 16 MB: at no time is a fourth of that allocated."""
    data = {"x": np.zeros((4000, 1000), np.float32)}
    source = Offline(data, 10, 8, draws="replacement")

    def work(k):
        for step in range(20):
            assert source(k, step)["x"].shape == (10, 1000)

    tracemalloc.start()
    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 10 * 1000 * 4 < peak < data["x"].nbytes / 4


def test_placed_on_a_mesh():
    source = Offline(DATA, 5, 4, seed=3)
    batches = source.batches(make_mesh({"data": 4, "model": 2}))
    next(batches)
    batch = next(batches)
    expected = np.concatenate([source(k, 1)["x"] for k in range(4)])
    np.testing.assert_array_equal(batch["x"], expected)
    assert {s.data.shape for s in batch["x"].addressable_shards} == {(5, 3)}
    assert batches.state()["step"] == 2
    with pytest.raises(ValueError, match="batch: saved 5, here 4"):
        Offline(DATA, 4, 4, seed=3).batches(batches.mesh).restore(batches.state())
    with pytest.raises(ValueError, match="4 workers along"):
        Offline(DATA, 5, 2).batches(batches.mesh)


def test_sparse_rows():
    source = Offline((scipy.sparse.csr_array(X), Y), 4, 2, draws="replacement")
    x, y = source(1, 5)
    rows = source.rows(1, 5)
    np.testing.assert_array_equal(x.toarray(), X[rows])
    np.testing.assert_array_equal(y, Y[rows])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Offline(DATA, 1, 42), "42 workers and 41 samples"),
        (lambda: Offline(DATA, 11, 4), "10 samples, which do not fill a batch of 11"),
        (lambda: Offline(DATA, 0), "batch=0"),
        (lambda: Offline(DATA, 1, draws="some"), "draws='some'"),
        (lambda: Offline({"x": X, "y": Y[1:]}, 1), "'x': 41, 'y': 40"),
        (lambda: Offline({"x": X, "s": 1.0}, 1), "'s': 'a scalar'"),
        (lambda: Offline({}, 1), "expected arrays"),
        (lambda: Offline(DATA, 1, 2, parts=contiguous(41, 2)), 'parts with draws="global"'),
        (lambda: Offline(DATA, 1, 3, draws="local", parts=contiguous(41, 2)), "2 parts for 3"),
        (lambda: Offline(DATA, 1, 2, draws="local", parts=contiguous(42, 2)), "0|21 .. 41"),
        (lambda: Offline(DATA, 1, 1, draws="local", parts=[[]]), "part 0 is float64"),
        (lambda: Offline(DATA, 1, 2)(2, 0), "worker 2, step 0"),
        (lambda: Offline(DATA, 1, 2)(0, -1), "step -1"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
