"""Several servers as one: what they hold, and that nothing else changes."""

import numpy as np
import pytest

from jdml.communicate import error_feedback
from jdml.communicate.codecs import int8
from jdml.communicate.cost import Link
from jdml.communicate.pace import (
    Evicted,
    Network,
    Rule,
    Server,
    SgdWorker,
    ShardedServer,
    Task,
    VirtualClock,
    add,
    async_admm,
    asynchronous,
    backup,
    dc_asgd_adaptive,
    delayed_nesterov,
    simulate,
    stale_synchronous,
    synchronous,
)
from jdml.communicate.pace.sharded import equal_shares

K = 3


def tree(seed, dtype=np.float64):
    draws = np.random.default_rng(seed)
    return {
        "table": draws.standard_normal((40, 5)).astype(dtype),
        "layer": [draws.standard_normal(7).astype(dtype), draws.standard_normal(()).astype(dtype)],
    }


class Pull(Task):
    """Towards a tree of its own, with a noise of its own."""

    def init(self, worker, params):
        return ()

    def step(self, worker, params, state, index, towards=None):
        aim, noise = tree(worker), tree(1000 * worker + index)

        def towards_it(w, t, n):
            return (0.1 * (t - w + 0.1 * n)).astype(w.dtype)

        update = {
            "table": towards_it(params["table"], aim["table"], noise["table"]),
            "layer": [
                towards_it(*leaves)
                for leaves in zip(params["layer"], aim["layer"], noise["layer"], strict=True)
            ],
        }
        return update, state, 0.0


def run(make, rule, dtype=np.float64, num_versions=25, **options):
    server = make(tree(99, dtype), rule, K, now=VirtualClock(), **options)
    times = np.random.default_rng(2).lognormal(0.0, 0.8, (64, K))
    simulate(
        server,
        [SgdWorker(k, Pull()) for k in range(K)],
        times,
        num_versions=num_versions,
        network=Network(Link(0.01, 1e6)),
    )
    return server


def sharded(params, rule, num_workers, **options):
    return ShardedServer(params, rule, num_workers, 4, **options)


@pytest.mark.parametrize(
    "rule",
    [
        Rule(synchronous(), add(1 / K)),
        Rule(stale_synchronous(2), dc_asgd_adaptive(0.1)),
        Rule(asynchronous(), delayed_nesterov(0.7, 0.9, K)),
        Rule(backup(1), add()),
        async_admm(2, 3),
    ],
)
def test_four_servers_are_one_bit_for_bit(rule):
    one, four = run(Server, rule), run(sharded, rule)
    np.testing.assert_array_equal(one.params["table"], four.params["table"])
    for x, y in zip(one.params["layer"], four.params["layer"], strict=True):
        np.testing.assert_array_equal(x, y)
    assert one.traffic == four.traffic
    assert one.version == four.version


def test_shares_are_equal_to_the_element():
    leaves = [np.zeros((40, 5)), np.zeros(7), np.zeros(())]
    for num in (1, 2, 4, 7):
        shares = equal_shares(leaves, num)
        sizes = [sum(p.stop - p.start for p in share) for share in shares]
        assert sum(sizes) == 208
        assert max(sizes) - min(sizes) <= 1
    mixed = equal_shares([np.zeros(4, np.float64), np.zeros(8, np.float32)], 2)
    assert [[(p.leaf, p.start, p.stop) for p in share] for share in mixed] == [
        [(0, 0, 4)],
        [(1, 0, 8)],
    ]


def test_codecs_serve_each_server_by_itself():
    options = {"push": error_feedback(int8(64)), "pull": int8(64)}
    rule = Rule(synchronous(), add(1 / K))
    exact = run(sharded, rule, np.float32)
    coded = run(sharded, rule, np.float32, **options)
    np.testing.assert_allclose(coded.params["table"], exact.params["table"], atol=0.05)
    assert coded.traffic.pushed_bytes < 0.5 * exact.traffic.pushed_bytes


def test_members_are_those_of_all():
    server = sharded(tree(0), Rule(asynchronous(), add()), 2)
    for worker in range(2):
        server.register(worker)
    snapshot = server.pull(0)
    assert snapshot.version == (0,) * 4
    ack = server.push(0, 0, 0, tree(1), snapshot.version)
    assert (ack.accepted, server.clock(0), server.version) == (True, 1, 1)
    assert server.push(0, 0, 0, tree(1), snapshot.version).duplicate
    assert server.version == 1
    saved = server.snapshot()
    server.evict(0, "gone")
    assert list(server.members()) == [1]
    with pytest.raises(Evicted, match="gone"):
        server.pull(0)
    other = sharded(tree(5), Rule(asynchronous(), add()), 2)
    other.restore(saved)
    np.testing.assert_array_equal(other.params["table"], server.params["table"])
    assert sorted(other.members()) == [0, 1]
    with pytest.raises(ValueError, match="without any"):
        ShardedServer(np.zeros(2), Rule(asynchronous(), add()), 1, 3)


def test_a_worker_that_died_between_two_servers_starts_at_one_clock():
    server = ShardedServer(tree(0), Rule(stale_synchronous(1), add()), 2, 3)
    for worker in range(2):
        server.register(worker)
    update = server.sender(0)(tree(1), 0)
    base = server.pull(0).version
    server.servers[0].push(0, 0, 0, update.content[0], base[0])  # and died
    assert server.register(0, 1).clock == 1
    assert [s.clock(0) for s in server.servers] == [1, 1, 1]
    server.push(0, 1, 1, tree(2), server.pull(0).version)
    assert [s.clock(0) for s in server.servers] == [2, 2, 2]
    # The other one's clock is nought everywhere, and holds all of them as before.
    assert server.min_clock == 0
    assert server.try_pull(0) is None
