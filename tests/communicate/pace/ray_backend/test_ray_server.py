"""A server in another process: what it answers, and what lost answers leave."""

import os
import signal
import socket
import sys
import threading
import time

import numpy as np
import pytest

from jdml.communicate.codecs import int8
from jdml.communicate.error_feedback import error_feedback
from jdml.communicate.pace import (
    Closed,
    Connection,
    Evicted,
    Rule,
    Server,
    ShardedServer,
    StaleTimeout,
    add,
    async_admm,
    asynchronous,
    stale_synchronous,
)
from jdml.communicate.pace.ray_backend import Unreachable, local_session, ray_server, run_ray
from jdml.communicate.pace.ray_backend.shelf import ROOT, Shelf
from tests.communicate.pace.ray_backend.listeners import listeners

K = 3
RULE = Rule(stale_synchronous(2), add(0.5))
PARAMS = {"a": np.arange(6.0).reshape(2, 3), "b": np.zeros(5, np.float32)}


def update(worker, seq):
    draws = np.random.default_rng([worker, seq])
    return {
        "a": draws.standard_normal((2, 3)),
        "b": draws.standard_normal(5).astype(np.float32),
    }


@pytest.fixture(scope="module")
def empty(session):
    server = ray_server(PARAMS, RULE, K)
    yield server, server.snapshot()
    server.stop()


@pytest.fixture
def server(empty):
    """One process for all tests, each time as it was at the start."""
    server, state = empty
    server.restore(state)
    return server


def lines(server):
    return [Connection(server, k) for k in range(K)]


def exchange(server, num_rounds=2):
    """What every worker reads in rounds one after the other, and the acks."""
    said = []
    for _ in range(num_rounds):
        for line in server:
            snapshot = line.pull()
            said.append((snapshot.version, snapshot.min_clock, snapshot.params))
            seq, parcel = line.encode(update(line.worker, line.clock))
            said.append(line.push(seq, parcel, snapshot.version))
    return said


def same(x, y):
    assert str(x) == str(y)
    if isinstance(x, dict):
        for name, value in x.items():
            assert value.dtype == y[name].dtype
            np.testing.assert_array_equal(value, y[name])


def test_every_listener_is_on_the_loopback_interface(session, server):
    found = listeners()
    assert found  # Ray's own services, and one for each actor
    assert {address for _, address in found} <= {"127.0.0.1", "::1"}


def test_answers_as_a_server_that_is_here(server):
    here = Server(PARAMS, RULE, K)
    for mine, theirs in zip(exchange(lines(server)), exchange(lines(here)), strict=True):
        same(mine, theirs)
    same(server.params, here.params)
    assert server.version == here.version == 6
    assert (server.traffic, server.staleness) == (here.traffic, here.staleness)
    assert server.members().keys() == here.members().keys()
    assert [server.clock(k) for k in range(K)] == [2, 2, 2]
    assert not server.pull(0).params["a"].flags.writeable


@pytest.mark.parametrize("near", [True, False])
def test_large_parameters_on_this_machine_and_from_another(session, near):
    """Through a shelf, or where the two do not share one, through Ray."""
    params = {"a": np.linspace(-1, 1, 300_000), "b": np.zeros((3, 100_001), np.float32)}
    rule, before = Rule(asynchronous(), add(0.5)), shelves()
    server, here = ray_server(params, rule, 1), Server(params, rule, 1)
    if not near:
        server._here, server._shelf = "another machine", Shelf("another machine")
    mine, theirs = Connection(server, 0), Connection(here, 0)
    kept = []
    for seq in range(4):
        draws = np.random.default_rng(seq)
        step = {name: draws.standard_normal(x.shape).astype(x.dtype) for name, x in params.items()}
        for line in (mine, theirs):
            base = line.pull()
            kept.append(base.params)
            assert not base.params["a"].flags.writeable
            assert line.push(*line.encode(step), base.version).accepted
    # What was read stays as it was, also where the server has gone on.
    for x, y in zip(kept[::2], kept[1::2], strict=True):
        same(x, y)
    same(server.params, here.params)
    assert server.traffic == here.traffic
    assert server._near is near
    assert bool(server._reader._mapped) is near
    assert shelves() > before
    server.stop()
    server._shelf.close()
    assert shelves() == before


def test_an_update_whose_shelf_is_gone_goes_through_ray(session):
    params = {"a": np.zeros(300_000)}
    server = ray_server(params, Rule(asynchronous(), add()), 1)
    lay = server._shelf.lay

    def lay_and_lose(content):
        laid = lay(content)
        server._shelf.close()
        return laid

    server._shelf.lay = lay_and_lose
    line = Connection(server, 0)
    base = line.pull().version
    assert line.push(*line.encode({"a": np.ones(300_000)}), base).accepted
    np.testing.assert_array_equal(server.params["a"], 1.0)
    server.stop()


def shelves():
    return {folder.name for folder in ROOT.glob("jdml-shelf-*")}


def test_a_push_that_comes_twice_or_too_early_counts_once(server):
    line, *_ = lines(server)
    base = line.pull().version
    sent = [line.encode(update(0, seq)) for seq in range(2)]
    for order in (1, 1, 0, 1, 0):
        ack = line.push(*sent[order], base)
        assert ack.accepted
    assert server.version == 2
    assert server.clock(0) == 2
    here = Server(PARAMS, RULE, K)
    line, *_ = lines(here)
    base = line.pull().version
    for order in (1, 0):
        line.push(*sent[order], base)
    same(server.params, here.params)


def test_an_old_incarnation_changes_nothing(server):
    old, *_ = lines(server)
    base = old.pull().version
    seq, parcel = old.encode(update(0, 0))
    new = Connection(server, 0, 1)
    for refused in (
        lambda: old.push(seq, parcel, base),
        lambda: old.pull(),
        lambda: server.heartbeat(0, 0),
        lambda: Connection(server, 0, 0),
    ):
        with pytest.raises(Evicted, match=r"worker 0.* incarnation 0 was replaced"):
            refused()
    assert server.version == 0
    with pytest.raises(ValueError, match="worker 0 is registered already, as incarnation 1"):
        Connection(server, 0, 1)
    assert new.pull().version == 0


def test_errors_are_those_of_the_server(server):
    line, *_ = lines(server)
    base = line.pull().version
    with pytest.raises(ValueError, match="'b' has shape"):
        server.push(0, 0, 0, {"a": PARAMS["a"], "b": np.zeros(4, np.float32)}, base)
    with pytest.raises(ValueError, match="worker 0 has no version 7"):
        server.push(0, 0, 0, update(0, 0), 7)
    for seq in range(3):
        server.push(0, 0, seq, update(0, seq), base)
    began = time.monotonic()
    with pytest.raises(StaleTimeout, match=r"worker 0 waited 0.3 s: .* clock 3.*\[1, 2\]"):
        server.pull(0, timeout=0.3)
    assert 0.3 <= time.monotonic() - began < 5
    with pytest.raises(StaleTimeout, match=r"'here': worker 0 waited 0.2 s for workers \[1, 2\]"):
        server.barrier("here", 0, timeout=0.2)


def test_those_who_wait_leave_room_for_the_others(server):
    waiting, *others = lines(server)
    base = waiting.pull().version
    for seq in range(3):
        server.push(0, 0, seq, update(0, seq), base)
    got = []
    threads = [
        threading.Thread(target=lambda: got.append(server.pull(0, timeout=30))) for _ in range(4)
    ]
    threads += [threading.Thread(target=server.barrier, args=("end", k, 30)) for k in range(K)]
    for thread in threads[:-1]:
        thread.start()
    for line in others:
        seq, parcel = line.encode(update(line.worker, 0))
        line.push(seq, parcel, line.pull().version)
    threads[-1].start()
    for thread in threads:
        thread.join(30)
    assert [s.min_clock for s in got] == [1] * 4


@pytest.fixture(scope="module")
def shards(session):
    """Two processes with codecs."""
    codecs = {"push": error_feedback(int8(4)), "pull": int8(4)}
    server = ray_server(PARAMS, RULE, K, num_shards=2, **codecs)
    yield server, server.snapshot()
    server.stop()


def test_shards_hold_what_shards_in_this_process_do(shards):
    server, state = shards
    server.restore(state)
    here = ShardedServer(PARAMS, RULE, K, 2, push=error_feedback(int8(4)), pull=int8(4))
    for mine, theirs in zip(exchange(lines(server)), exchange(lines(here)), strict=True):
        same(mine, theirs)
    same(server.params, here.params)
    assert server.traffic == here.traffic


@pytest.mark.slow
def test_a_lost_server_is_asked_until_it_is_back(session, shards):
    server, state = shards
    server.restore(state)
    line, *_ = lines(server)
    base = line.pull().version
    line.push(*line.encode(update(0, 0)), base)
    saved = server.snapshot()
    lost = server.servers[1]
    os.kill(lost.place()[1], signal.SIGKILL)
    said = []

    def push():
        try:
            line.push(*line.encode(update(0, 1)), base)
        except Evicted as error:
            said.append(str(error))

    thread = threading.Thread(target=push)
    thread.start()
    while thread.is_alive():
        # What is there answers; what was started anew knows nothing until it is told.
        try:
            lost._call("restore", saved[1], True, again=False)
            break
        except Unreachable:
            time.sleep(0.05)
    thread.join(30)
    assert len(said) == 1
    assert "restored from a snapshot; register as a newer incarnation" in said[0]
    assert [s.version for s in server.servers] == [2, 1]
    # The other one is a push ahead; the newer incarnation starts there, at both.
    new = Connection(server, 0, 1)
    assert new.clock == 2
    base = new.pull(timeout=20).version
    assert new.push(*new.encode(update(0, 2)), base).accepted
    assert [s.clock(0) for s in server.servers] == [3, 3]


class Slow:
    """Called in the server's process after each update: takes its time once."""

    def __init__(self):
        self.slept = False

    def __call__(self, applied):
        if not self.slept:
            self.slept = True
            time.sleep(1.0)


def test_lost_answers_silent_workers_and_closed_servers(session):
    rule = Rule(asynchronous(), add())
    server = ray_server(PARAMS, rule, 2, lease=3, on_applied=Slow(), call_seconds=0.4)
    line, _ = Connection(server, 0), Connection(server, 1)
    ack = line.push(*line.encode(update(0, 0)), line.pull().version)
    assert ack == (1, True, True)  # the second try found that the first had come
    assert server.version == 1
    same(server.params, {k: PARAMS[k] + update(0, 0)[k] for k in PARAMS})

    # Worker 1 says nothing more: 0 is freed within the lease.
    began = time.monotonic()
    server.barrier("without 1", 0)
    assert time.monotonic() - began <= server.lease
    with pytest.raises(Evicted, match=r"worker 1 .*silent for longer than the lease"):
        server.heartbeat(1, 0)

    said = []
    Connection(server, 1, 1)

    def wait():
        try:
            server.barrier("never", 0)
        except Closed as error:
            said.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.1)
    server.close("enough")
    thread.join(10)
    assert said == ["the server is closed: enough"]
    with pytest.raises(Closed, match="enough"):
        line.pull()

    server.stop()
    server.patience = 0.0

    def ask_for_long():
        for _ in range(600):  # Ray takes a moment to end it
            server.place()
            time.sleep(0.05)

    with pytest.raises(Unreachable, match="the server did not answer 'place'"):
        ask_for_long()


def test_what_is_missing_is_named(session, monkeypatch):
    with pytest.raises(ValueError, match="num_shards=0"):
        ray_server(PARAMS, RULE, K, num_shards=0)
    with pytest.raises(ValueError, match="4"):
        ray_server(PARAMS, async_admm(num_reports=4, max_age=3), 2)
    with pytest.raises(ValueError, match="expected a server made by ray_server"):
        run_ray(Server(PARAMS, RULE, K), lambda k: None, seconds=1)
    with (
        pytest.raises(ValueError, match="a Ray session is open already"),
        local_session(num_cpus=1),
    ):
        pass
    monkeypatch.setattr(session, "is_initialized", lambda: False)
    with pytest.raises(ValueError, match=r"there is no Ray session.*local_session\(num_cpus=4\)"):
        ray_server(PARAMS, RULE, K)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(ValueError, match=rf"127.0.0.1:{port} cannot be had \(Address already"),
            local_session(num_cpus=1, port=port),
        ):
            pass


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'jdml\[ray\]'"):
        ray_server(PARAMS, RULE, K)
    with (
        pytest.raises(ImportError, match=r"pip install 'jdml\[ray\]'"),
        local_session(num_cpus=1),
    ):
        pass
