"""Processes that are killed while they save, and processes that save one checkpoint together."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jdml.sharding import make_mesh
from jdml.train.checkpoint import Checkpointer

ROOT = Path(__file__).resolve().parents[2]

SAVE_IN_A_LOOP = """
    import sys
    import jax
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec
    from jdml.sharding import make_mesh
    from jdml.train.checkpoint import Checkpointer

    sharding = NamedSharding(make_mesh({"data": 2}), PartitionSpec("data"))
    with Checkpointer(sys.argv[1], keep=2) as checkpointer:
        for step in range((checkpointer.latest_step() or 0) + 1, 10_000):
            arrays = [np.random.default_rng(step + i).normal(size=(64, 512)) for i in range(8)]
            state = {str(i): jax.device_put(x.astype("f4"), sharding) for i, x in enumerate(arrays)}
            checkpointer.save(step, state, data={"step": step})
"""


@pytest.mark.parametrize(
    "pauses", [(0.013,), pytest.param((0.0, 0.013, 0.037), marks=pytest.mark.slow)], ids=len
)
def test_a_killed_process_leaves_a_newest_checkpoint_that_is_whole(tmp_path, pauses):
    folder = tmp_path / "run"
    sharding = NamedSharding(make_mesh({"data": 8}), PartitionSpec("data"))
    leaf = jax.ShapeDtypeStruct((64, 512), jnp.float32, sharding=sharding)
    newest = 0
    for pause in pauses:
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SAVE_IN_A_LOOP), str(folder)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.DEVNULL,
        )
        try:
            deadline = time.monotonic() + 60
            while not any((folder / str(newest + k)).is_dir() for k in range(3, 8)):
                assert process.poll() is None, "the process that saves ended by itself"
                assert time.monotonic() < deadline, "the process that saves made no progress"
                time.sleep(0.002)
            time.sleep(pause)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        with Checkpointer(folder, read_only=True) as checkpointer:
            latest = checkpointer.latest_step()
            # A CheckpointWarning would be an error here: no step was skipped.
            state, data, step = checkpointer.restore({str(i): leaf for i in range(8)})
        assert step == latest
        assert step >= newest + 3
        assert data == {"step": step}
        for i in range(8):
            expected = np.random.default_rng(step + i).normal(size=(64, 512)).astype("f4")
            assert np.array_equal(np.asarray(state[str(i)]), expected)
        newest = step


ONE_OF_TWO = """
    import sys
    import warnings
    from typing import NamedTuple
    import jax
    folder, port, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(
        f"127.0.0.1:{port}", 2, index, coordinator_bind_address=f"127.0.0.1:{port}"
    )
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec
    from jdml.sharding import make_mesh
    from jdml.train.checkpoint import Checkpointer, CheckpointWarning
    from jdml.train.data import Batches, Corpus

    mesh = make_mesh({"data": 2, "model": 2})
    def put(x, *names):
        sharding = NamedSharding(mesh, PartitionSpec(*names))
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
    def state(step):
        x = np.random.default_rng(step).normal(size=(8, 6)).astype("f4")
        return {"a": put(x, "data", "model"), "b": put(x, "model"), "c": put(x)}
    def same(got, step):
        return all(
            np.array_equal(shard.data, state(step)[name].addressable_shards[k].data)
            for name, array in got.items() for k, shard in enumerate(array.addressable_shards)
        )

    with Checkpointer(folder, {"layers": 2}, keep=2) as checkpointer:
        for step in range(4):
            checkpointer.save(step, state(step), data={"step": step})
        checkpointer.wait()
        assert checkpointer.steps() == [2, 3], checkpointer.steps()
        got = checkpointer.restore(state(0))
        assert got.step == 3 and same(got.state, 3)
        if index == 0:
            import json
            from jdml.train.saving.record import seal, unseal
            file = checkpointer.folder / "3/record/record.json"
            record = unseal(file.read_bytes())
            record["digests"]["b"] ^= 1
            file.write_text(json.dumps(seal(record)))
        from jax.experimental import multihost_utils
        multihost_utils.sync_global_devices("damaged")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            got = checkpointer.restore(state(0))
        assert got.step == 2 and same(got.state, 2)
        assert sum(w.category is CheckpointWarning for w in caught) == 1
        checkpointer.save(3, state(7), wait=True)
        got = checkpointer.restore(state(0))
        assert got.step == 3 and same(got.state, 7)

    # Saved by four workers, restored on two: worker j takes over those of j and j + 2.
    class Feedback(NamedTuple):
        residual: dict
    debt = np.random.default_rng(9).normal(size=(4, 6)).astype("f4")
    four = Feedback({name: put(debt, ("data", "model")) for name in "abcdef"})
    two = Feedback({name: put(debt[:2], "data") for name in "abcdef"})
    with Checkpointer(folder + "-workers") as checkpointer:
        checkpointer.save(0, four, wait=True)
        for array in checkpointer.restore(two).state.residual.values():
            for shard in array.addressable_shards:
                expected = (debt[:2] + debt[2:])[shard.index]
                assert np.array_equal(shard.data, expected)

    corpus = Corpus(np.arange(200, dtype=np.uint8), 256, "counting")
    for names in (("data",), (None, "data"), ("model",), ("data", "model")):
        sharding = NamedSharding(mesh, PartitionSpec(*names))
        placed = next(Batches(corpus, 4, 8, seed=1, sharding=sharding))
        plain = next(Batches(corpus, 4, 8, seed=1))
        for name, array in placed.items():
            for shard in array.addressable_shards:
                assert np.array_equal(shard.data, plain[name][shard.index]), names
    print("fine", index)
"""


@pytest.mark.slow
def test_two_processes_save_restore_and_fall_back_together(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, "-c", textwrap.dedent(ONE_OF_TWO)),
                *(str(tmp_path / "run"), str(port), str(index)),
            ],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=90) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for index, (process, (out, err)) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, err[-4000:]
        assert f"fine {index}" in out
