"""Streams: chunks are the rows, passes are the sums, products are those of the whole matrix."""

import gc
import itertools
import threading
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from sklearn.datasets import dump_svmlight_file

from jdml.partition.sources import (
    ArrayStream,
    LibsvmStream,
    NpyStream,
    StreamBatches,
    StreamedRows,
    accumulate,
    libsvm,
    padded_rows,
)
from jdml.partition.sources.passes import read_ahead

RANDOM = np.random.default_rng(0)
N, D = 203, 7
SPARSE = scipy.sparse.random_array((N, D), density=0.4, rng=RANDOM).tocsr().astype(np.float32)
X = SPARSE.toarray()
Y = RANDOM.choice([-1, 1], N).astype(np.float32)


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    np.save(folder / "x.npy", X)
    np.save(folder / "y.npy", Y)
    dump_svmlight_file(SPARSE, Y, str(folder / "a.svm"), zero_based=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(libsvm, "PARSED_AT_ONCE", 2000)
        text = LibsvmStream(
            folder / "a.svm", num_features=D, zero_based=False, dtype=np.float32, chunk_bytes=1
        )
    return {
        "dense": ArrayStream(X, Y, chunk_rows=30),
        "one chunk": ArrayStream(X, Y),
        "sparse": ArrayStream(SPARSE, Y, chunk_rows=37),
        "npy": NpyStream(folder / "x.npy", folder / "y.npy", chunk_bytes=50 * 4 * D),
        "libsvm": text,
    }


NAMES = ["dense", "one chunk", "sparse", "npy", "libsvm"]


def dense(rows):
    return rows.toarray() if scipy.sparse.issparse(rows) else rows


@pytest.mark.parametrize("name", NAMES)
def test_chunks_are_the_rows(streams, name):
    stream = streams[name]
    chunks = [stream.chunk(k) for k in range(stream.num_chunks)]
    assert (len(chunks) > 3) == (name != "one chunk")
    assert stream.shape == (N, D)
    np.testing.assert_array_equal(np.concatenate([dense(c.rows) for c in chunks]), X)
    np.testing.assert_array_equal(np.concatenate([c.labels for c in chunks]), Y)
    assert [c.start for c in chunks] == stream.starts[:-1].tolist()
    shapes = {tuple(np.shape(x) for x in jax.tree.leaves(stream.padded(c))) for c in chunks}
    assert len(shapes) == 1
    again = stream.chunk(1 % stream.num_chunks)  # in any order
    np.testing.assert_array_equal(dense(again.rows), dense(chunks[1 % len(chunks)].rows))


@pytest.mark.parametrize("name", NAMES)
def test_one_pass_gives_value_gradient_and_hessian_times_vector(streams, name):
    """Of the logistic loss, in two compiled programs for all chunks, against the whole matrix."""
    stream = streams[name]
    w, v = RANDOM.standard_normal((2, D)).astype(np.float32)
    traced = itertools.count()

    @jax.jit
    def contribution(padded):
        next(traced)
        valid = jnp.arange(padded.labels.shape[0]) < padded.num_rows
        if stream.sparse:
            row, column, value = padded.x
            x = jnp.zeros((stream.most_rows, D)).at[row, column].add(value)
        else:
            x = padded.x
        margins = padded.labels * (x @ w)
        loss = jnp.where(valid, jnp.logaddexp(0, -margins), 0).sum()
        slope = jnp.where(valid, -padded.labels * jax.nn.sigmoid(-margins), 0)
        bend = jnp.where(valid, jax.nn.sigmoid(margins) * jax.nn.sigmoid(-margins), 0)
        return {"loss": loss, "gradient": x.T @ slope, "hvp": x.T @ (bend * (x @ v))}

    sums = accumulate(stream, lambda chunk: contribution(stream.padded(chunk)), progress=False)
    margins = Y * (X.astype(np.float64) @ w)
    p = 1 / (1 + np.exp(-margins))
    np.testing.assert_allclose(sums["loss"], -np.log(p).sum(), rtol=1e-5)
    np.testing.assert_allclose(sums["gradient"], X.T @ (-Y * (1 - p)), rtol=1e-4, atol=1e-4)
    hvp = X.T @ (p * (1 - p) * (X @ v))
    np.testing.assert_allclose(sums["hvp"], hvp, rtol=1e-4, atol=1e-4)
    assert sums["loss"].dtype == np.float64
    assert next(traced) == 1  # compiled once


@pytest.mark.parametrize("name", NAMES)
def test_products_inside_a_compiled_loop(streams, name):
    """The power method, whose every step multiplies by X and by its transpose."""
    rows = StreamedRows(streams[name])

    @jax.jit
    def power(rows, v):
        def step(_, v):
            v = rows.rmatvec(rows.matvec(v))
            return v / jnp.linalg.norm(v)

        return jax.lax.fori_loop(0, 5, step, v)

    v = np.ones(D)
    for _ in range(5):
        v = X.T @ (X @ v)
        v /= np.linalg.norm(v)
    np.testing.assert_allclose(power(rows, jnp.ones(D)), v, rtol=1e-5)
    assert rows.num_passes == 10


@pytest.mark.parametrize("name", ["sparse", "npy"])
def test_other_products(streams, name):
    rows = StreamedRows(streams[name])
    w, v = RANDOM.standard_normal((D, 3)), RANDOM.standard_normal((N, 3))
    np.testing.assert_allclose(rows.matvec(jnp.asarray(w)), X @ w, atol=1e-5)
    np.testing.assert_allclose(rows.rmatvec(jnp.asarray(v)), X.T @ v, atol=1e-4)
    np.testing.assert_allclose(rows.squared_norms(), (X**2).sum(1), rtol=1e-5)
    weights = RANDOM.random(N)
    gram = rows.gram(jnp.asarray(weights))
    np.testing.assert_allclose(gram, X.T @ (X * weights[:, None]), rtol=1e-4, atol=1e-5)
    for call in (lambda: rows.take([0]), lambda: rows.dot(0, w), lambda: rows.T):
        with pytest.raises(ValueError, match="no single rows"):
            call()


@pytest.mark.parametrize("make", [np.asarray, scipy.sparse.csr_array], ids=["dense", "sparse"])
def test_callbacks_take_no_large_arguments(make, monkeypatch):
    """JAX may wait for ever where one does, on a machine of two cores."""
    x = np.repeat(X, 400, 0)  # a chunk of 81,200 rows, whose weights are 325 kB
    rows = StreamedRows(ArrayStream(make(x), np.repeat(Y, 400), chunk_rows=90_000))
    sizes, callback = [], jax.pure_callback

    def noting(f, result, *arguments, **options):
        sizes.extend(jnp.asarray(leaf).nbytes for leaf in jax.tree.leaves(arguments))
        return callback(f, result, *arguments, **options)

    monkeypatch.setattr(jax, "pure_callback", noting)
    weights = np.linspace(0, 1, len(x), dtype=np.float32)
    expected = x.T.astype(np.float64) @ (x * weights[:, None])
    np.testing.assert_allclose(rows.gram(jnp.asarray(weights)), expected, rtol=1e-3)
    rows.rmatvec(rows.matvec(jnp.ones(D)))
    assert len(sizes) >= 3
    assert max(sizes) < 100_000


@pytest.mark.parametrize("name", ["dense", "sparse", "libsvm"])
def test_minibatches_take_each_row_once_an_epoch(streams, name):
    batches = StreamBatches(streams[name], 10, seed=4, shuffle_chunks=2)
    assert batches.batches_per_epoch == 20
    key = {x.tobytes() + y.tobytes(): i for i, (x, y) in enumerate(zip(X, Y, strict=True))}
    seen = []
    for _ in range(2):
        epoch = [next(batches) for _ in range(20)]
        assert {b.rows.shape for b in epoch} == {(10, D)}
        drawn = [
            key[x.tobytes() + y.tobytes()]
            for b in epoch
            for x, y in zip(dense(b.rows), b.labels, strict=True)
        ]
        counts = np.bincount(drawn, minlength=N)
        assert counts.sum() == 200
        # Rows that are alike have one key, so a count is what the data have of it, at most.
        have = np.bincount([key[x.tobytes() + y.tobytes()] for x, y in zip(X, Y, strict=True)])
        assert np.all(counts[: len(have)] <= have)
        seen.append(drawn)
    assert seen[0] != seen[1]
    assert batches.epoch == 2


def test_minibatches_go_on_from_any_position(streams):
    whole = StreamBatches(streams["npy"], 9, seed=1, shuffle_chunks=2)
    expected = [next(whole) for _ in range(60)]
    for stop in (0, 1, 7, 21, 22, 23, 44, 59):
        batches = StreamBatches(streams["npy"], 9, seed=1, shuffle_chunks=2)
        batches.restore({**whole.state(), "step": stop})
        got = next(batches)
        np.testing.assert_array_equal(got.rows, expected[stop].rows)
        np.testing.assert_array_equal(got.labels, expected[stop].labels)
    with pytest.raises(ValueError, match="shuffle_chunks: saved 2, here 3"):
        StreamBatches(streams["npy"], 9, seed=1, shuffle_chunks=3).restore(whole.state())


def test_who_stops_early_waits_for_nobody():
    """An iterator that is dropped may be closed within any thread, which must not wait there."""
    reading, let_go = threading.Event(), threading.Event()

    class Slow(ArrayStream):
        def rows(self, number):
            if number == 1:
                reading.set()
                let_go.wait(60)
            return super().rows(number)

    def threads():
        return [t for t in threading.enumerate() if t.name.startswith("read ahead")]

    before = threads()
    chunks = read_ahead(Slow(X, Y, chunk_rows=30), range(3))
    next(chunks)
    assert reading.wait(60)
    closing = threading.Thread(target=chunks.close)
    closing.start()
    closing.join(10)
    waits = closing.is_alive()
    let_go.set()
    assert not waits
    del chunks
    end = time.monotonic() + 60
    while set(threads()) - set(before) and time.monotonic() < end:
        time.sleep(0.01)
    assert not set(threads()) - set(before)


def test_batches_that_are_dropped_keep_nothing():
    batches = StreamBatches(ArrayStream(X, Y, chunk_rows=30), 10)
    next(batches)
    kept = weakref.ref(batches)
    gc.disable()
    try:
        del batches
        assert kept() is None
    finally:
        gc.enable()


def test_padded_rows():
    columns, values = padded_rows(SPARSE, 7)
    w = RANDOM.standard_normal(D)
    np.testing.assert_allclose((values * w[columns]).sum(1), X @ w, atol=1e-6)
    with pytest.raises(ValueError, match=r"width=1\): row \d+ has"):
        padded_rows(SPARSE, 1)


def test_progress_is_shown(streams, capsys):
    accumulate(streams["npy"], lambda chunk: len(chunk.labels), progress=True)
    assert f"{N}/{N} rows" in capsys.readouterr().err
    rows = StreamedRows(streams["dense"], progress=True)
    jax.block_until_ready(jax.jit(rows.matvec)(jnp.ones(D)))
    assert "arrays, pass 1" in capsys.readouterr().err


def test_an_error_in_the_reading_thread_reaches_the_caller(tmp_path):
    (tmp_path / "a.svm").write_text("1 1:2\n" * 1000)
    stream = LibsvmStream(tmp_path / "a.svm")
    (tmp_path / "a.svm").write_text("1 1:2\n" * 999 + "1 x:2\n")
    with pytest.raises(ValueError, match=r"a.svm, line 1000: expected index:value, got 'x:2'"):
        accumulate(stream, lambda chunk: 0.0, progress=False)
    (tmp_path / "a.svm").write_text("1 1:2\n" * 3)
    with pytest.raises(ValueError, match="has become shorter"):
        stream.chunk(0)
    (tmp_path / "a.svm").write_text("1 1:2\n" * 998 + "1 2:3 4:5  \n")
    with pytest.raises(ValueError, match="num_features=1"):
        stream.chunk(0)


def test_refused(tmp_path, streams):
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "f.npy", np.asfortranarray(X))
    np.save(tmp_path / "i.npy", np.ones((3, 2), int))
    with pytest.raises(ValueError, match=r"203 rows, and labels of shape \(3,\)"):
        NpyStream(tmp_path / "x.npy", [1, 2, 3])
    with pytest.raises(ValueError, match="in Fortran order; expected rows in C order"):
        NpyStream(tmp_path / "f.npy", Y)
    with pytest.raises(ValueError, match="holds int64; expected floats"):
        NpyStream(tmp_path / "i.npy", [1, 2, 3])
    with pytest.raises(ValueError, match="is compressed"):
        LibsvmStream(tmp_path / "a.svm.gz")
    with pytest.raises(ValueError, match=r"batch=204"):
        StreamBatches(streams["npy"], 204)
    with pytest.raises(ValueError, match="shuffle_chunks=0"):
        StreamBatches(streams["npy"], 2, shuffle_chunks=0)
    with pytest.raises(ValueError, match="chunk_rows=0"):
        ArrayStream(X, Y, chunk_rows=0)
    with pytest.raises(ValueError, match=r"shape \(203,\); expected"):
        ArrayStream(Y, Y)
    with pytest.raises(ValueError, match="has no float64"):
        StreamedRows(ArrayStream(X.astype(np.float64), Y))
