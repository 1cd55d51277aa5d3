"""Processes that meet, agree and exchange: two real ones where that matters, threads elsewhere."""

import concurrent.futures
import dataclasses
import functools
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jdml.sharding import fingerprint as prints
from jdml.sharding import hosts, make_mesh
from jdml.sharding.rendezvous import meet

ROOT = Path(__file__).parents[2]


def free_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


# --- Two processes ----------------------------------------------------------------------------

SCRIPT = """
import sys, time
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from jdml.sharding import hosts, make_mesh

mode = sys.argv[1]
me = hosts.initialize(timeout=20)
assert hosts.initialize(num_processes=2) == me == (jax.process_index(), 2), me
rank = me.process_id
if mode == "agree":
    try:
        hosts.initialize(num_processes=3)
    except ValueError as error:
        assert "got num_processes=3" in str(error)
    hosts.check_fingerprint({"lr": 0.1})
    hosts.check_fingerprint({"lr": 0.2})  # a later call does not see the earlier table
    sent = {
        "int": np.arange(3) + rank,
        "odd": np.array([rank, -0.0, np.nan], np.float32),
        "none": np.zeros((0, 2)),
        "bool": rank == 0,
        "float": 1.5 + rank,
        "name": "run-" + "x" * rank,
        "key": jax.random.key(rank),
    }
    got = hosts.broadcast_from_first(sent)
    assert got["int"].tolist() == [0, 1, 2] and got["int"].dtype == sent["int"].dtype
    assert got["odd"].tobytes() == np.array([0, -0.0, np.nan], np.float32).tobytes()
    assert got["none"].shape == (0, 2)
    assert (got["bool"], got["float"], got["name"]) == (True, 1.5, "run-")
    assert jax.random.key_data(got["key"]).tolist() == [0, 0]

    mesh = make_mesh({"data": 4, "model": 1})
    local = {"x": np.arange(6).reshape(2, 3) + 100 * rank, "weight": np.full((5,), 2.0)}
    batch = hosts.global_batch(local, mesh, {"x": P("data"), "weight": P()})
    assert batch["x"].shape == (4, 3) and batch["weight"].shape == (5,)
    total = jax.jit(lambda b: b["x"].sum(), out_shardings=NamedSharding(mesh, P()))(batch)
    assert int(total) == 15 + 615, total
    try:
        hosts.global_batch({"x": np.zeros((3, 3))}, mesh)
    except ValueError as error:
        assert "x has 3 rows along dim 0" in str(error), error

    if rank == 1:
        time.sleep(1.0)
        hosts.barrier("last")
    else:
        begin = time.monotonic()
        try:
            hosts.barrier("alone", timeout=0.3)
        except TimeoutError as error:
            assert "process 1 did not come" in str(error), error
        hosts.barrier("last")
        assert time.monotonic() - begin > 0.5
    print("agreed")
elif mode == "differ":
    hosts.check_fingerprint({"model": {"num_layers": 2 + rank}, "seed": 3})
elif mode == "trees":
    hosts.broadcast_from_first({"w": np.zeros(3 + rank)})
elif mode == "exit":
    if rank == 1:
        sys.exit(7)
    time.sleep(60)
"""


def two_processes(tmp_path, mode):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    begin = time.monotonic()
    done = subprocess.run(
        f"{sys.executable} -m jdml.launch -n 2 --devices-per-process 2 -- {script} {mode}".split(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    return done, time.monotonic() - begin


def test_two_processes_agree_and_exchange(tmp_path):
    done, _ = two_processes(tmp_path, "agree")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"[0] agreed", "[1] agreed"} <= set(done.stdout.splitlines())


@pytest.mark.parametrize(
    ("mode", "difference"),
    [
        ("differ", "config.model.num_layers: 2 on process 0; 3 on process 1"),
        pytest.param(
            "trees",
            "w: float64[3] on process 0; float64[4] on process 1",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_processes_that_differ_all_say_how_and_end_in_seconds(tmp_path, mode, difference):
    done, seconds = two_processes(tmp_path, mode)
    assert done.returncode == 1
    for rank in (0, 1):
        assert f"[{rank}]   {difference}" in done.stderr, done.stderr
    assert "config.seed" not in done.stderr
    assert seconds < 45  # JAX alone waits 300 s for those that do not end


@pytest.mark.slow
def test_a_process_that_leaves_with_a_code_does_not_wait_for_the_others(tmp_path):
    done, seconds = two_processes(tmp_path, "exit")
    assert done.returncode == 7, done.stderr
    assert "process 1 exited with code 7" in done.stderr
    assert seconds < 45


# --- Meeting ----------------------------------------------------------------------------------


def together(*calls):
    """Each call in a thread of its own: what it returned or raised."""
    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(call) for call in calls]
        return [f.exception(timeout=30) for f in futures]


def test_all_meet_whatever_the_order_and_the_port_is_free_again():
    address = free_address()
    for _ in range(2):
        late = functools.partial(meet, address, 3, 0, 10)

        def first(late=late):
            time.sleep(0.3)
            late()

        others = [functools.partial(meet, address, 3, rank, 10) for rank in (1, 2)]
        assert together(first, *others) == [None, None, None]


def test_the_first_process_names_who_did_not_come():
    address = free_address()
    first, second = together(lambda: meet(address, 4, 0, 0.6), lambda: meet(address, 4, 2, 0.6))
    assert isinstance(first, TimeoutError)
    assert "process 1, 3 did not come" in str(first)
    assert isinstance(second, TimeoutError)


def test_a_coordinator_that_is_not_there():
    address = free_address()
    begin = time.monotonic()
    with pytest.raises(
        TimeoutError, match=rf"process 1 of 2 could not meet process 0 at {address}"
    ):
        meet(address, 2, 1, 0.3)
    assert time.monotonic() - begin < 5
    with pytest.raises(ValueError, match="expected a coordinator as 'host:port', got 'here'"):
        meet("here", 2, 1, 0.3)


def test_two_processes_with_one_number_or_another_count():
    address = free_address()
    errors = together(
        lambda: meet(address, 3, 0, 5),
        lambda: meet(address, 3, 1, 5),
        lambda: meet(address, 3, 1, 5),
    )
    assert all("two processes call themselves process 1" in str(e) for e in errors), errors
    errors = together(lambda: meet(address, 2, 0, 5), lambda: meet(address, 4, 1, 5))
    assert all("expects 2 processes, process 1 expects 4" in str(e) for e in errors), errors


def test_strangers_on_the_port_do_no_harm():
    address = free_address()
    host, port = address.split(":")

    def stranger():
        for _ in range(100):
            try:
                with socket.create_connection((host, int(port)), timeout=1) as connection:
                    connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
                    return
            except ConnectionRefusedError:
                time.sleep(0.01)

    def second():
        time.sleep(0.2)
        meet(address, 2, 1, 10)

    assert together(lambda: meet(address, 2, 0, 10), stranger, second) == [None, None, None]


# --- One process ------------------------------------------------------------------------------


def test_alone_nothing_waits():
    begin = time.monotonic()
    assert hosts.initialize() == (0, 1)
    assert hosts.initialize("127.0.0.1:1", 1, 0) == (0, 1)
    hosts.barrier("alone")
    hosts.check_fingerprint({"lr": 0.1})
    tree = {"w": np.arange(3), "name": "run", "rate": 0.5, "key": jax.random.key(3)}
    got = hosts.broadcast_from_first(tree)
    assert got["w"].tolist() == [0, 1, 2]
    assert (got["name"], got["rate"]) == ("run", 0.5)
    assert jax.random.key_data(got["key"]).tolist() == [0, 3]
    assert time.monotonic() - begin < 5


def test_initialize_after_the_first_computation_is_refused():
    jnp.zeros(1)
    with pytest.raises(RuntimeError, match="before the first computation"):
        hosts.initialize("127.0.0.1:1", 2, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coordinator": "a:1"}, "give num_processes and process_id too"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "got 2 of 2"),
    ],
)
def test_initialize_with_part_of_what_it_needs(arguments, message):
    with pytest.raises(ValueError, match=message):
        hosts.initialize(**arguments)


def test_a_cluster_that_jax_detects(monkeypatch):
    for name, value in {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "node[001-002]",
        "SLURM_NTASKS": "8",
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
    }.items():
        monkeypatch.setenv(name, value)
    calls = []
    monkeypatch.setattr(hosts.xla_bridge, "backends_are_initialized", lambda: False)
    monkeypatch.setattr(hosts, "leave_at_once_on_failure", lambda farewell: None)
    monkeypatch.setattr(hosts, "meet", lambda *a: calls.append(a))
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append((a, k)))
    assert hosts.initialize(timeout=9) == (5, 8)
    met, (given, named) = calls
    address = given[0]
    assert address.startswith("node001:")
    assert met == (address, 8, 5, 9)
    assert given == (address, 8, 5)
    assert named["local_device_ids"] == [1]
    assert (named["initialization_timeout"], named["coordinator_bind_address"]) == (9, None)


def test_broadcast_refuses_objects():
    with pytest.raises(ValueError, match="got object at odd"):
        hosts.broadcast_from_first({"odd": object()})


def test_global_batch_on_one_process():
    mesh = make_mesh({"data": 4, "model": 2})
    local = {"x": np.arange(24.0).reshape(8, 3), "y": (np.arange(8), np.ones((2, 6)))}
    batch = hosts.global_batch(local, mesh, {"x": P("data"), "y": (P(), P(None, "model"))})
    for placed, given, spec in [
        (batch["x"], local["x"], P("data")),
        (batch["y"][0], local["y"][0], P()),
        (batch["y"][1], local["y"][1], P(None, "model")),
    ]:
        assert placed.sharding.is_equivalent_to(NamedSharding(mesh, spec), given.ndim)
        np.testing.assert_array_equal(placed, given)
    again = hosts.global_batch(batch, mesh, {"x": P("data"), "y": (P(), P(None, "model"))})
    assert again["x"] is batch["x"]
    default = hosts.global_batch({"x": np.zeros((8, 2))}, mesh)
    assert default["x"].sharding.spec == P("data")


def test_global_batch_names_the_leaf_that_does_not_fit():
    mesh = make_mesh({"data": 4, "model": 2})
    with pytest.raises(ValueError, match=r"batch/x has 6 rows along dim 0 .* multiple of 4"):
        hosts.global_batch({"batch": {"x": np.zeros((6, 2))}}, mesh)
    with pytest.raises(ValueError, match=r"multiple of 8"):
        hosts.global_batch({"x": np.zeros((4, 2))}, mesh, P(("data", "model")))
    with pytest.raises(ValueError, match=r"x has 1 dims, .* names 2"):
        hosts.global_batch({"x": np.zeros(8)}, mesh, P("data", "model"))


# --- Fingerprints -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    num_layers: int = 2
    rates: tuple[float, ...] = (0.1, 0.2)
    activation: object = jax.nn.relu
    other: object = None


def test_equal_configurations_have_equal_fingerprints():
    def make():
        return Config(
            other={
                "set": {"b", "a", "c"},
                "array": np.arange(3),
                "partial": functools.partial(max, 1, key=abs),
                "instance": object(),
                "empty": [],
            }
        )

    first, second = prints.flatten(make()), prints.flatten(make())
    assert first == second
    assert first["config.rates.1"] == "0.2"
    assert first["config.other.instance"] == "<object>"
    assert first["config.other.empty"] == "list()"


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        (Config(num_layers=3), "config.num_layers"),
        (Config(rates=(0.1, 0.3)), "config.rates.1"),
        (Config(activation=jax.nn.gelu), "config.activation"),
        (Config(other=np.zeros(2)), "config.other"),
        (Config(other="x" * 1000), "config.other"),
        (Config(other=functools.partial(max, 1)), "config.other"),
    ],
)
def test_differences_are_named(changed, key):
    lines = prints.differences({0: prints.flatten(Config()), 1: prints.flatten(changed)})
    assert lines
    assert all(line.startswith(key) for line in lines), lines
    assert all(len(line) < 500 for line in lines)
    summaries = {prints.summary(prints.flatten(c)) for c in (Config(), changed)}
    assert len(summaries) == 2


def test_every_value_is_shown_with_its_processes():
    tables = {rank: {"jax": "0.10.2" if rank in (0, 1, 2, 5) else "0.12.0"} for rank in range(6)}
    assert prints.differences(tables) == ["jax: 0.10.2 on process 0-2, 5; 0.12.0 on process 3-4"]
    assert prints.differences({0: {"a": "1"}, 1: {}}) == ["a: 1 on process 0; absent on process 1"]


def test_sources_flags_and_versions_are_part_of_it(tmp_path, monkeypatch):
    (tmp_path / "part").mkdir()
    source = tmp_path / "part" / "model.py"
    source.write_text("x = 1\n")
    before = prints.fingerprint(code=[tmp_path])
    assert before["jax"] == jax.__version__
    assert "code jdml/sharding/hosts.py" in before
    source.write_text("x = 2\n")
    monkeypatch.setenv("XLA_FLAGS", "--xla_new=1")
    lines = prints.differences({0: before, 1: prints.fingerprint(code=[tmp_path])})
    assert [line.partition(":")[0] for line in lines] == [
        "XLA_FLAGS",
        f"code {tmp_path.name}/part/model.py",
    ]
