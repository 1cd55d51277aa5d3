"""Shared arrays: one copy on the host, whatever the number of processes and threads; measured."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from jdml.partition.sources import Offline, SharedArrays, map_npy, share
from tests.partition.sources.memory import MEASURE, needs_proc, start

MEGABYTES, NUM_PROCESSES = 48, 3
ROWS = MEGABYTES * 2**20 // 400

# Draws in four threads, waits until all processes hold what they read, and prints in MB: what of
# the shared files it holds (proportionally and in full), by how much its own memory grew, and by
# how much it grows once more with a copy.
READER = (
    MEASURE
    + """
import sys, threading
import numpy as np
from jdml.partition.sources import Offline, SharedArrays
source = Offline(
    dict(SharedArrays(sys.argv[1])), 500, 4, seed=int(sys.argv[2]), draws="replacement"
)

def work(k):
    for step in range(source.num_samples // 500):
        source(k, step)["x"].sum()

before = held("Pss_Anon")
threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print("read", flush=True)
sys.stdin.readline()
anonymous = held("Pss_Anon")
shares = [mapped("Pss", sys.argv[1]), mapped("Rss", sys.argv[1])]
copy = np.array(source.data["x"])
print(*shares, anonymous - before, held("Pss_Anon") - anonymous, flush=True)
sys.stdin.readline()
"""
)


@needs_proc
def test_processes_and_threads_hold_the_data_once():
    """Three processes of four threads each draw from 48 MB until nearly every row was read.

    Each has it all resident; in sum they hold it once; and none has memory of its own for it.
    """
    x = np.random.default_rng(0).standard_normal((ROWS, 50))
    with share({"x": x}) as shared:
        processes = [start(READER, shared.folder, k) for k in range(NUM_PROCESSES)]
        try:
            for process in processes:
                assert process.stdout.readline() == "read\n"
            found = []
            for process in processes:  # one after the other, while all hold it
                process.stdin.write("measure\n")
                process.stdin.flush()
                found.append([float(word) for word in process.stdout.readline().split()])
        finally:
            for process in processes:
                process.communicate("done\n", timeout=60)
    proportional, resident, grown, copied = np.array(found).T
    assert resident.min() > 0.95 * MEGABYTES
    assert proportional.sum() < 1.05 * MEGABYTES
    assert grown.max() < MEGABYTES / 4
    assert copied.min() > 0.9 * MEGABYTES  # so that a copy would have been seen


def test_an_array_goes_by_name(tmp_path):
    arrays = {"x": np.arange(6.0).reshape(3, 2), "y": np.array([1, 2, 3])}
    with share(arrays, tmp_path) as shared:
        again = pickle.loads(pickle.dumps(shared))
        assert set(again) == {"x", "y"}
        assert len(again) == 2
        for name, x in arrays.items():
            np.testing.assert_array_equal(again[name], x)
            assert not again[name].flags.writeable
        assert len(pickle.dumps(shared)) < 500
        batch = Offline(dict(again), 3, draws="in order")(0, 0)
        assert np.shares_memory(batch["x"], again["x"])
        folder = Path(shared.folder)
        assert folder.parent == tmp_path
        with pytest.raises(KeyError):
            again["z"]
    assert not folder.exists()
    np.testing.assert_array_equal(again["x"], arrays["x"])  # still mapped
    with pytest.raises(FileNotFoundError):
        SharedArrays(folder)


def test_refused(tmp_path):
    for arrays in ({}, {"a/b": np.zeros(1)}, {"": np.zeros(1)}, {".a": np.zeros(1)}):
        with pytest.raises(ValueError, match="arrays by name"), share(arrays, tmp_path):
            pass
    (tmp_path / "bad.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match=r"bad.npy cannot be read as a .npy array"):
        map_npy(tmp_path / "bad.npy")
    with pytest.raises(FileNotFoundError, match=r"no such .npy file"):
        map_npy(tmp_path / "none.npy")
