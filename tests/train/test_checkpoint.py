"""Saving and resuming: exact, on any mesh, and nothing wrong or foreign taken for right."""

import errno
import functools
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jdml.partition.samples import Sampler
from jdml.sharding import make_mesh
from jdml.train.checkpoint import Checkpointer, CheckpointWarning
from jdml.train.saving import orbax
from jdml.train.saving.record import seal, unseal

# When one read or write fails, those beside it end after Orbax has closed its event loop, which
# prints an error of no consequence.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

CONFIG = {"model": {"layers": 2, "width": 8}, "codec": "int8"}


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any
    residuals: Any
    key: Any


def make_state(mesh: Mesh, seed: int = 0, size: int = 8) -> State:
    """Moments, per-worker residuals, typed keys and odd shapes, sharded over both axes."""
    rng = np.random.default_rng(seed)

    def put(x: Any, *names: str | None) -> jax.Array:
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*names)))

    params = {
        "layers": [
            {"kernel": put(rng.normal(size=(size, 4)).astype(np.float32), "data", "model")},
            {"kernel": put(jnp.asarray(rng.normal(size=(4, size)), jnp.bfloat16), None, "model")},
        ],
        "scale": put(np.float32(rng.normal())),
        "bits": put(np.array([np.nan, -0.0, np.inf, 1e-40], np.float32)),
        "empty": put(np.zeros((0, 3), np.float32)),
        "mask": put(rng.integers(0, 2, 8).astype(bool), "data"),
    }
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    opt_state = jax.tree.map(put, tx.init(params))
    return State(
        step=put(jnp.int32(seed)),
        params=params,
        opt_state=opt_state,
        residuals=put(rng.integers(-128, 128, (8, 3)).astype(np.int8), ("data", "model")),
        key=(put(jax.random.key(seed)), put(jax.random.split(jax.random.key(seed), 8), "data")),
    )


def abstract(state: Any, mesh: Mesh | None = None) -> Any:
    def describe(x: jax.Array) -> jax.ShapeDtypeStruct:
        sharding = x.sharding
        if mesh is not None:
            sharding = NamedSharding(mesh, x.sharding.spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(describe, state)


def bits(x: jax.Array) -> bytes:
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x).tobytes()


def assert_same(got: Any, expected: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert bits(a) == bits(b)


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(file.relative_to(folder)): (file.stat().st_mtime_ns, file.read_bytes())
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return make_mesh({"data": 4, "model": 2})


@pytest.fixture(scope="module")
def states(mesh) -> list[State]:
    return [make_state(mesh, seed) for seed in range(4)]


# Round trips


def test_the_whole_state_comes_back_bit_by_bit(tmp_path, mesh, states):
    sampler = Sampler(100, 8, seed=3)
    next(sampler)
    with Checkpointer(tmp_path / "new/run", CONFIG) as checkpointer:
        assert checkpointer.latest_step() is None
        checkpointer.save(7, states[1], data=sampler.state(), wait=True)
    with Checkpointer(tmp_path / "new/run", CONFIG) as checkpointer:
        state, data, step = checkpointer.restore(abstract(states[1]))
    assert (step, data) == (7, sampler.state())
    assert_same(state, states[1])
    shardings = jax.tree.map(lambda x: x.sharding, states[1])
    assert jax.tree.map(lambda x: x.sharding, state) == shardings


def test_a_state_moves_between_eight_four_and_one_device(tmp_path, states):
    mesh_4 = make_mesh({"data": 2, "model": 2}, devices=jax.devices()[2:6])
    mesh_1 = make_mesh({"data": 1, "model": 1}, devices=jax.devices()[5:6])
    mesh_8 = make_mesh({"data": 2, "model": 4})
    state = states[2]
    for number, target in enumerate([mesh_4, mesh_1, mesh_8]):
        with Checkpointer(tmp_path / str(number)) as checkpointer:
            checkpointer.save(0, state, wait=True)
            state = checkpointer.restore(abstract(state, target)).state
        assert_same(state, states[2])
        assert all(x.sharding.mesh == target for x in jax.tree.leaves(state))


def test_single_device_shardings_are_taken(tmp_path, states):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), states[0]
    )
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, states[0], wait=True)
        state = checkpointer.restore(target).state
    assert_same(state, states[0])
    assert {x.sharding for x in jax.tree.leaves(state)} == {device}


def test_saving_runs_beside_steps_that_donate_the_state(tmp_path, mesh):
    sharding = NamedSharding(mesh, PartitionSpec("data"))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state):
        return jax.tree.map(lambda x: x + 1, state)

    state = {str(i): jax.device_put(np.full((64, 1024), i, np.float32), sharding) for i in range(8)}
    target = abstract(state)
    with Checkpointer(tmp_path, keep=10) as checkpointer:
        for number in range(4):
            checkpointer.save(number, state)
            for _ in range(5):
                state = step(state)
        checkpointer.wait()
        for number in range(4):
            saved = checkpointer.restore(target, number).state
            for name, array in saved.items():
                assert np.all(np.asarray(array) == int(name) + 5 * number)


def test_a_restored_state_steps_without_a_second_compile(tmp_path, mesh, states):
    @functools.partial(jax.jit, donate_argnums=0)
    def step(params):
        return jax.tree.map(lambda x: x * 2 if x.dtype == jnp.float32 else x, params)

    params = {"a": states[0].params["layers"][0]["kernel"] + 0, "b": states[0].step + 0}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, params, wait=True)
        target = abstract(params)
        expected = step(params)
        again = step(checkpointer.restore(target).state)
    assert_same(again, expected)
    assert step._cache_size() == 1


def test_data_may_be_left_out_and_changed_lists_do_not_matter(tmp_path, states):
    data = {"seen": [1, 2]}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, states[0])
        checkpointer.save(1, states[0], data=data)
        data["seen"].append(3)
        checkpointer.wait()
        assert checkpointer.restore(abstract(states[0]), 0).data is None
        assert checkpointer.restore(abstract(states[0])).data == {"seen": [1, 2]}


# What stays


def test_the_latest_and_the_best_stay(tmp_path, states):
    losses = [3.0, 1.0, 2.0, float("nan"), 5.0, 4.0]
    with Checkpointer(tmp_path, keep=2, best_metric="loss") as checkpointer:
        for step, loss in enumerate(losses[:4]):
            checkpointer.save(step, states[0], metrics={"loss": loss})
        checkpointer.wait()
        assert checkpointer.steps() == [1, 2, 3]
    # The next run remembers which was best.
    with Checkpointer(tmp_path, keep=2, best_metric="loss") as checkpointer:
        for step, loss in list(enumerate(losses))[4:]:
            checkpointer.save(step, states[0], metrics={"loss": loss})
        checkpointer.wait()
        assert checkpointer.steps() == [1, 4, 5]


def test_the_best_may_be_the_greatest(tmp_path, states):
    with Checkpointer(
        tmp_path, keep=1, best_metric="accuracy", best_mode="max", keep_best=2
    ) as checkpointer:
        for step, accuracy in enumerate([0.1, 0.9, 0.5, 0.7, 0.2]):
            checkpointer.save(step, states[0], metrics={"accuracy": accuracy})
        checkpointer.wait()
        assert checkpointer.steps() == [1, 3, 4]


def test_a_running_and_a_torn_save_are_not_listed(tmp_path, states):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, states[0], wait=True)
        (tmp_path / "4.orbax-checkpoint-tmp/state").mkdir(parents=True)
        (tmp_path / "5/state").mkdir(parents=True)
        assert checkpointer.steps() == [3]
        assert checkpointer.latest_step() == 3
        assert checkpointer.restore(abstract(states[0])).step == 3
    # The next run clears up before it saves.
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(6, states[0], wait=True)
        assert not (tmp_path / "4.orbax-checkpoint-tmp").exists()
        assert checkpointer.steps() == [3, 6]


# Damage


def damage_bytes(file: Path) -> None:
    content = bytearray(file.read_bytes())
    for position in range(len(content) // 3, len(content), max(1, len(content) // 3)):
        content[position] ^= 0x10
    file.write_bytes(bytes(content))


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize(
    "damage",
    [
        damage_bytes,
        pytest.param(truncate, marks=pytest.mark.slow),
        pytest.param(Path.unlink, marks=pytest.mark.slow),
    ],
)
def test_no_damaged_file_gives_a_wrong_state(tmp_path, states, damage):
    saved = tmp_path / "saved"
    with Checkpointer(saved) as checkpointer:
        checkpointer.save(1, states[1], data={"step": 1}, wait=True)
        checkpointer.save(2, states[2], data={"step": 2}, wait=True)
    files = [str(f.relative_to(saved)) for f in (saved / "2").rglob("*") if f.is_file()]
    data_files = [f for f in files if "/d/" in f or f.endswith(("record.json", ".ocdbt"))]
    assert len(data_files) >= 5
    fell_back = set()
    for number, file in enumerate(files):
        folder = tmp_path / str(number)
        shutil.copytree(saved, folder)
        damage(folder / file)
        with Checkpointer(folder, read_only=True) as checkpointer:
            if file.endswith("record.json") and damage is Path.unlink:
                assert checkpointer.steps() == [1]
                restored = checkpointer.restore(abstract(states[0]))
            else:
                restored = restore_quietly(checkpointer, abstract(states[0]))
        assert_same(restored.state, states[restored.step])
        assert restored.data == {"step": restored.step}
        if restored.step == 1:
            fell_back.add(file)
    # Bookkeeping that nothing needs may be damaged; what holds the state may not.
    assert "2/record/record.json" in fell_back
    assert any("/d/" in file for file in fell_back)


def test_a_flipped_bit_that_orbax_does_not_see_is_seen(tmp_path, mesh):
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    numbers = [np.random.default_rng(i).normal(size=(256, 256)).astype(np.float32) for i in (0, 1)]
    target = {"x": jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=sharding)}
    with Checkpointer(tmp_path) as checkpointer:
        for step, x in enumerate(numbers):
            checkpointer.save(step, {"x": jax.device_put(x, sharding)}, wait=True)
    file = max((tmp_path / "1/state").rglob("*"), key=lambda f: f.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    wrong = orbax.read_arrays(tmp_path / "1/state", target)["x"]
    assert np.sum(np.asarray(wrong) != numbers[1]) >= 1
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.warns(CheckpointWarning, match="'x': the bits are not those saved"):
            state, _, step = checkpointer.restore(target)
        assert step == 0
        assert np.array_equal(np.asarray(state["x"]), numbers[0])


def restore_quietly(checkpointer: Checkpointer, target: Any) -> Any:
    """Restores; demands a warning that names the newest step exactly if it is skipped."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CheckpointWarning)
        restored = checkpointer.restore(target)
    messages = [str(w.message) for w in caught if w.category is CheckpointWarning]
    assert len(messages) == (restored.step != 2)
    assert all(m.startswith("Checkpoint of step 2 in ") for m in messages)
    assert not any("NoEntryError" in m for m in messages)
    return restored


def swap_digest(folder: Path, step: int, path: str) -> None:
    """Makes the saved array differ from its digest, as a flipped bit on the disk would."""
    file = folder / str(step) / "record/record.json"
    record = unseal(file.read_bytes())
    record["digests"][path] ^= 1 << 17
    file.write_text(json.dumps(seal(record)))


def test_a_damaged_newest_checkpoint_is_skipped_loudly_and_training_goes_on(tmp_path, states):
    target = abstract(states[0])
    with Checkpointer(tmp_path, keep=5) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, states[step], wait=True)
    swap_digest(tmp_path, 2, "params/scale")
    swap_digest(tmp_path, 3, "opt_state/1/0/mu/layers/0/kernel")
    with Checkpointer(tmp_path, keep=5) as checkpointer:
        with pytest.warns(CheckpointWarning) as caught:
            restored = checkpointer.restore(target)
        assert restored.step == 1
        assert_same(restored.state, states[1])
        assert ["step 3" in str(w.message) for w in caught] == [True, False]
        assert "'opt_state/1/0/mu/layers/0/kernel'" in str(caught[0].message)
        assert "'params/scale': the bits are not those saved" in str(caught[1].message)
        # Nothing is touched by looking.
        assert checkpointer.steps() == [1, 2, 3]
        # Going on takes the place of the damaged steps, which are kept under another name.
        checkpointer.save(2, restored.state, wait=True)
        assert checkpointer.steps() == [1, 2]
        assert (tmp_path / "damaged-2").is_dir()
        assert (tmp_path / "damaged-3").is_dir()
    with Checkpointer(tmp_path) as checkpointer:
        assert_same(checkpointer.restore(target).state, states[1])


def test_no_checkpoint_that_verifies_says_why_for_each(tmp_path, states):
    with Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, states[step], wait=True)
        swap_digest(tmp_path, 1, "step")
        shutil.rmtree(tmp_path / "2/state/d")
        shutil.rmtree(tmp_path / "2/state/ocdbt.process_0")
        message = r"(?s)step 2: its arrays cannot be read .*step 1: 'step': the bits"
        with pytest.warns(CheckpointWarning), pytest.raises(OSError, match=message) as caught:
            checkpointer.restore(abstract(states[0]))
        assert caught.value.filename == str(tmp_path)


def test_a_step_asked_for_is_not_replaced_by_another(tmp_path, states):
    with Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, states[step], wait=True)
        swap_digest(tmp_path, 2, "step")
        with pytest.raises(OSError, match="no checkpoint could be restored") as caught:
            checkpointer.restore(abstract(states[0]), step=2)
        assert caught.value.errno == errno.EIO
        assert checkpointer.restore(abstract(states[0]), step=1).step == 1
        with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 5; there are \[1, 2\]"):
            checkpointer.restore(abstract(states[0]), step=5)


def test_an_empty_folder_has_nothing_to_restore(tmp_path, states):
    with (
        Checkpointer(tmp_path) as checkpointer,
        pytest.raises(FileNotFoundError, match="no checkpoint") as caught,
    ):
        checkpointer.restore(abstract(states[0]))
    assert caught.value.filename == str(tmp_path)


def test_trouble_of_the_machine_is_not_taken_for_damage(tmp_path, states, monkeypatch):
    def out_of_memory(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, states[1], wait=True)
        monkeypatch.setattr(orbax, "read_arrays", out_of_memory)
        with pytest.raises(jax.errors.JaxRuntimeError, match="out of memory"):
            checkpointer.restore(abstract(states[0]))


# What is refused


def test_another_configuration_is_refused_at_once(tmp_path, states):
    with Checkpointer(tmp_path, CONFIG) as checkpointer:
        checkpointer.save(1, states[0], wait=True)
    before = contents(tmp_path)
    other = {"model": {"layers": 4, "width": 8}, "codec": None, "seed": 1}
    message = (
        r"(?s)codec: saved 'int8', given None\n.*model\.layers: saved 2, given 4\n.*"
        r"seed: saved \(nothing\), given 1\n"
    )
    with pytest.raises(ValueError, match=message):
        Checkpointer(tmp_path, other)
    assert contents(tmp_path) == before
    # Without a configuration none is compared.
    Checkpointer(tmp_path).close()


def test_another_model_is_refused_before_an_array_is_read(tmp_path, mesh, states, monkeypatch):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, states[0], wait=True)
        before = contents(tmp_path)
        monkeypatch.setattr(orbax, "read_arrays", lambda *_: pytest.fail("arrays were read"))
        target = abstract(states[0])
        params = dict(target.params)
        replicated = NamedSharding(mesh, PartitionSpec())
        params["scale"] = jax.ShapeDtypeStruct((3,), jnp.float32, sharding=replicated)
        params["bits"] = jax.ShapeDtypeStruct((4,), jnp.bfloat16, sharding=replicated)
        params["new"] = params.pop("mask")
        message = (
            r"(?s)'params/bits': saved float32\[4\], given bfloat16\[4\].*"
            r"'params/scale': saved float32\[\], given float32\[3\].*"
            r"'params/new' \(bool\[8\]\) is not in the checkpoint.*"
            r"'params/mask' \(bool\[8\]\) is only in the checkpoint"
        )
        with pytest.raises(ValueError, match=message):
            checkpointer.restore(target._replace(params=params))
    assert contents(tmp_path) == before


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "7").mkdir()
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"something else .*: 7, thesis\.tex\. Give a new"):
        Checkpointer(tmp_path)
    assert contents(tmp_path) == before
    assert sorted(e.name for e in tmp_path.iterdir()) == ["7", "thesis.tex"]


def test_steps_copied_by_themselves_are_taken(tmp_path, states):
    with Checkpointer(tmp_path / "run", CONFIG) as checkpointer:
        checkpointer.save(1, states[1], wait=True)
    shutil.copytree(tmp_path / "run/1", tmp_path / "copy/1")
    with Checkpointer(tmp_path / "copy", CONFIG) as checkpointer:
        assert_same(checkpointer.restore(abstract(states[0])).state, states[1])
    (tmp_path / "copy/jdml-checkpoints.json").unlink()
    (tmp_path / "copy/notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"something else than checkpoints of jdml: notes\.txt\."):
        Checkpointer(tmp_path / "copy")


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="this is a file") as caught:
        Checkpointer(tmp_path / "file")
    assert caught.value.filename == str(tmp_path / "file")


def test_a_bucket_is_refused():
    with pytest.raises(ValueError, match="mount the bucket"):
        Checkpointer("gs://bucket/run")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": 0}, "keep and keep_best must be at least 1"),
        ({"best_mode": "least"}, 'best_mode must be "min" or "max"'),
        ({"config": [1]}, "config must be a mapping"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        Checkpointer(tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_saved_is_refused(tmp_path, mesh, states):
    array = states[0].step
    donated = jax.device_put(np.zeros(3, np.float32), NamedSharding(mesh, PartitionSpec()))
    donated.delete()
    with Checkpointer(tmp_path, best_metric="loss") as checkpointer:
        save = functools.partial(checkpointer.save, metrics={"loss": 1.0})
        with pytest.raises(ValueError, match=r"'a/0' of the state is a ndarray, not a jax\.Array"):
            save(1, {"a": [np.zeros(3)]})
        with pytest.raises(ValueError, match="'b' of the state is a int"):
            save(1, {"a": array, "b": 3})
        with pytest.raises(ValueError, match="'a' of the state was donated"):
            save(1, {"a": donated})
        with pytest.raises(ValueError, match="'k' of the state is an empty array of keys"):
            save(1, {"a": array, "k": jax.random.split(jax.random.key(0), 8)[:0]})
        with pytest.raises(ValueError, match="the state has no leaves"):
            save(1, {})
        with pytest.raises(ValueError, match="two leaves of the state are called 'a/b'"):
            save(1, {"a": {"b": array}, "a/b": array})
        with pytest.raises(ValueError, match="data must be JSON"):
            save(1, {"a": array}, data={"x": object()})
        with pytest.raises(ValueError, match=r"metrics with 'loss'.*got \['accuracy'\]"):
            checkpointer.save(1, {"a": array}, metrics={"accuracy": 1})
        save(4, {"a": array})
        for step in (4, 3, -1):
            with pytest.raises(ValueError, match=f"cannot save step {step} .* is step 4"):
                save(step, {"a": array})
        assert checkpointer.steps() == [4]
    with (
        Checkpointer(tmp_path, read_only=True) as checkpointer,
        pytest.raises(ValueError, match="opened read_only"),
    ):
        checkpointer.save(5, {"a": array})


def test_what_cannot_be_restored_to_is_refused(tmp_path, mesh):
    replicated = NamedSharding(mesh, PartitionSpec())
    x = jax.device_put(np.zeros(6, np.float32), replicated)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, {"a": x, "b": x}, wait=True)
        with pytest.raises(ValueError, match="leaf 'b' to restore has no sharding"):
            checkpointer.restore({"a": x, "b": jax.ShapeDtypeStruct((6,), jnp.float32)})
        uneven = NamedSharding(mesh, PartitionSpec("data"))
        with pytest.raises(ValueError, match=r"leaf 'b' of shape \[6\] does not fit its sharding"):
            checkpointer.restore(
                {"a": x, "b": jax.ShapeDtypeStruct((6,), jnp.float32, sharding=uneven)}
            )
        elsewhere = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        with pytest.raises(ValueError, match=r"'b' would be restored to \S+ but 'a' to 8 devices"):
            checkpointer.restore(
                {"a": x, "b": jax.ShapeDtypeStruct((6,), jnp.float32, sharding=elsewhere)}
            )
