"""Disks that are full, read-only, or become so while a run saves."""

import errno
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jdml.sharding import make_mesh
from jdml.train.checkpoint import Checkpointer

# When one read or write fails, those beside it end after Orbax has closed its event loop, which
# prints an error of no consequence.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def make_state(num_rows: int, seed: int = 0) -> dict[str, jax.Array]:
    """``num_rows`` × 2 kB that do not compress."""
    x = np.random.default_rng(seed).normal(size=(num_rows, 512)).astype(np.float32)
    sharding = NamedSharding(make_mesh({"data": 4, "model": 2}), PartitionSpec("data"))
    return {"x": jax.device_put(x, sharding)}


@pytest.fixture
def mount(tmp_path) -> Iterator[Callable[..., Path]]:
    """Makes small file systems of one's own; skips where that is not allowed."""
    folders: list[Path] = []

    def make(options: str) -> Path:
        folder = tmp_path / f"disk{len(folders)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("a full or read-only disk needs a tmpfs, which needs root")
        folders.append(folder)
        return folder

    yield make
    for folder in folders:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_path_below_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="a part of this path is a file") as caught:
        Checkpointer(tmp_path / "file/run")
    assert caught.value.filename == str(tmp_path / "file/run")


def test_a_read_only_disk_is_refused_before_training(mount):
    disk = mount("size=1m,ro")
    with pytest.raises(OSError, match="cannot write checkpoints: Read-only") as caught:
        Checkpointer(disk / "run")
    assert caught.value.errno == errno.EROFS
    assert caught.value.filename == str(disk / "run")


def test_a_disk_that_becomes_read_only_shows_when_saving(mount):
    disk = mount("size=8m")
    with Checkpointer(disk) as checkpointer:
        checkpointer.save(1, make_state(8), wait=True)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(OSError, match="step 2 was not saved: Read-only") as caught:
            checkpointer.save(2, make_state(8), wait=True)
        assert caught.value.filename == str(disk)
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        checkpointer.save(3, make_state(8), wait=True)
        assert checkpointer.steps() == [1, 3]


def test_a_full_disk_is_refused_before_training(mount):
    disk = mount("size=1m")
    with Checkpointer(disk / "run") as checkpointer:
        checkpointer.check_room(make_state(8))
        large = jax.ShapeDtypeStruct((1000, 1000), jnp.float32)
        with pytest.raises(OSError, match=r"one checkpoint takes 4\.0 MB .*but 1\.0 MB are free"):
            checkpointer.check_room({"a": large, "key": jax.random.key(0)})
    (disk / "filler").write_bytes(b"x" * shutil.disk_usage(disk).free)
    with pytest.raises(OSError, match="cannot write checkpoints: No space left") as caught:
        Checkpointer(disk / "run")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(disk / "run"))
    assert not (disk / "run/.probe-0").exists()


def first_error(check: Callable[[], None]) -> OSError:
    """What ``check``, called as a training loop would, raises within a minute."""
    for _ in range(1200):
        try:
            check()
        except OSError as error:
            return error
        time.sleep(0.05)
    pytest.fail("no error showed")


def test_a_disk_that_fills_shows_at_the_next_check_and_loses_nothing(mount):
    disk = mount("size=4m")
    state = make_state(512)
    with Checkpointer(disk / "run", keep=1) as checkpointer:
        checkpointer.save(1, state, wait=True)
        filler = disk / "filler"
        filler.write_bytes(b"x" * (shutil.disk_usage(disk).free - 300_000))
        checkpointer.save(2, state)
        error = first_error(checkpointer.check)
        assert "step 2 was not saved: No space left" in str(error)
        assert "free some space" in str(error)
        assert (error.errno, error.filename) == (errno.ENOSPC, str(disk / "run"))
        # Told once; the checkpoint before is whole, and what was half written is gone.
        checkpointer.check()
        assert checkpointer.steps() == [1]
        assert not list((disk / "run").glob("*tmp*"))
        assert np.array_equal(checkpointer.restore(state).state["x"], state["x"])
        filler.unlink()
        checkpointer.save(3, state, wait=True)
        assert checkpointer.steps() == [3]


def test_a_failed_save_shows_when_the_next_one_begins(mount):
    disk = mount("size=1m")
    state = make_state(1024)
    checkpointer = Checkpointer(disk / "run")
    checkpointer.save(1, state)
    with pytest.raises(OSError, match="step 1 was not saved: No space left"):
        checkpointer.save(2, state)
    checkpointer.save(2, state)
    with pytest.raises(OSError, match="step 2 was not saved: No space left"):
        checkpointer.close()
