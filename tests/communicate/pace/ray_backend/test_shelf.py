"""Shared memory between processes: read in place, never written while it is read, swept up."""

import gc
import os
import pickle
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdml.communicate.codecs import int8
from jdml.communicate.pace.payload import Format
from jdml.communicate.pace.ray_backend import shelf as module
from jdml.communicate.pace.ray_backend.shelf import Elsewhere, Reader, Shelf, Stale, machine, sweep

HERE = machine("one node")
pytestmark = pytest.mark.skipif(not HERE, reason="there is no /dev/shm here")


@pytest.fixture
def shelf():
    shelf = Shelf(HERE)
    yield shelf
    shelf.close()


def content(value, size=300_000):
    return {"a": np.full(size, value, np.float32), "b": np.full((3, 5), value)}


def folders():
    return {f.name for f in module.ROOT.glob("jdml-shelf-*")}


def test_what_is_taken_is_what_was_laid_and_cannot_be_written(shelf):
    leaves = (
        np.arange(6.0).reshape(2, 3).T,
        np.float32(3.0) * np.ones(()),
        np.zeros((0, 4)),
        np.asarray(jnp.arange(7, dtype=jnp.bfloat16)),
        np.arange(10)[::2],
        np.random.default_rng(0).standard_normal(400_001),
    )
    params = {"w": np.linspace(-1, 1, 1000, dtype=np.float32)}
    encoded = Format(params, int8()).encode((params["w"],)).content
    reader = Reader(HERE)
    for tree in (leaves, content(2.0), encoded):
        ticket, hold = shelf.lay(tree)
        assert len(pickle.dumps(ticket)) < 2000
        taken = reader.take(ticket)
        assert str(taken) == str(tree)
        for x, y in zip(jax.tree.leaves(taken), jax.tree.leaves(tree), strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)
        del hold
    assert not reader.take(shelf.lay(content(0))[0])["a"].flags.writeable


def test_a_file_is_written_again_once_nobody_reads_it(shelf):
    reader = Reader(HERE)
    first, hold = shelf.lay(content(1.0))
    taken = reader.take(first)
    part = taken["a"][5:9]  # a view holds the whole
    del taken, hold
    paths = set()
    for value in range(2, 6):
        ticket, hold = shelf.lay(content(float(value)))
        paths.add(ticket.path)
        np.testing.assert_array_equal(reader.take(ticket)["a"], value)
        del hold
    assert len(paths) == 1
    assert first.path not in paths
    np.testing.assert_array_equal(part, 1.0)
    assert reader.take(first)["b"][0, 0] == 1.0
    del part
    gc.collect()
    again = [shelf.lay(content(7.0))[0].path for _ in range(2)]
    assert first.path in again
    with pytest.raises(Stale):
        reader.take(first)


def test_what_is_written_in_its_room_is_not_copied(shelf):
    reader = Reader(HERE)
    tree = content(1.0)
    for value in (2.0, 3.0):
        a, b = shelf.room((tree["a"], tree["b"]))
        assert (a.shape, a.dtype, b.shape, b.dtype) == ((300_000,), np.float32, (3, 5), np.float64)
        a[:], b[:] = value, value
        ticket, _ = shelf.lay({"a": a, "b": b})
        taken = reader.take(ticket)
        np.testing.assert_array_equal(taken["a"], value)
        b[0, 0] = -1  # so it is the same memory
        assert taken["b"][0, 0] == -1
        assert shelf.lay({"a": a, "b": b})[0] == ticket
    # Some of another version with it: that is copied.
    old = tree["b"]
    ticket, _hold = shelf.lay({"a": a, "b": old})
    assert ticket.path != shelf.lay({"a": a})[0].path
    # Not laid out, it is free again when it is let go.
    path = ticket.path
    del taken, a, b, _hold
    gc.collect()
    rooms = [shelf.room((np.zeros(10),)) for _ in range(3)]
    assert len({shelf.lay(room)[0].path for room in rooms}) == 3
    assert path in {shelf.lay(room)[0].path for room in rooms}


def test_larger_payloads_get_larger_files(shelf):
    reader = Reader(HERE)
    for size in (10, 1000, 100_000, 10):
        ticket, _hold = shelf.lay(content(size, size))
        np.testing.assert_array_equal(reader.take(ticket)["a"], np.full(size, size))


def test_where_it_cannot_be_had(shelf, monkeypatch):
    ticket, _hold = shelf.lay(content(1.0))
    with pytest.raises(Elsewhere):
        Reader(machine("another node")).take(ticket)
    with pytest.raises(Elsewhere):
        Reader("").take(ticket._replace(machine=""))
    assert Shelf("").lay(content(1.0)) is None
    assert Shelf("").room((np.zeros(3),))[0].shape == (3,)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    other = Shelf(HERE)
    assert other.lay(content(1.0)) is None
    assert other.room((np.zeros(3),))[0].shape == (3,)
    other.close()


def test_a_closed_shelf_leaves_nothing(shelf):
    before = folders()
    other = Shelf(HERE)
    ticket, _hold = other.lay(content(4.0))
    taken = Reader(HERE).take(ticket)
    assert len(folders() - before) == 1
    other.close()
    assert folders() == before
    np.testing.assert_array_equal(taken["a"], 4.0)
    with pytest.raises(Stale):
        Reader(HERE).take(ticket)


WRITER = """
import sys, time
import numpy as np
from jdml.communicate.pace.ray_backend.shelf import Reader, Shelf, machine
import pickle
shelf = Shelf(machine("one node"))
ticket, hold = shelf.lay({"a": np.full(300_000, 3.0)})
print(pickle.dumps(ticket).hex(), flush=True)
time.sleep(60)
"""


def test_a_killed_writer_takes_nothing_along_and_is_swept_up():
    before = folders()
    writer = subprocess.Popen([sys.executable, "-c", WRITER], stdout=subprocess.PIPE, text=True)
    try:
        ticket = pickle.loads(bytes.fromhex(writer.stdout.readline()))
        taken = Reader(HERE).take(ticket)
        sweep()
        assert len(folders() - before) == 1, "its writer lives"
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
    np.testing.assert_array_equal(taken["a"], 3.0)
    sweep()
    assert folders() == before
    np.testing.assert_array_equal(taken["a"], 3.0)
