"""Virtual time: what takes how long, what happens in which order, and that it repeats itself."""

import numpy as np
import pytest

from jdml.communicate.cost import Link
from jdml.communicate.pace import (
    Network,
    Outage,
    PaceError,
    Rule,
    Server,
    SgdWorker,
    VirtualClock,
    add,
    asynchronous,
    average,
    backup,
    constant,
    heavy_tailed,
    log_normal,
    simulate,
    stale_synchronous,
    synchronous,
)
from tests.communicate.pace.problems import Quadratic, sgd_workers, start

ONES = np.ones((1, 2))


def run(pace, times, apply=None, num_workers=2, params=None, lease=float("inf"), **options):
    worker_options = options.pop("worker", {})
    applied = []
    server = Server(
        start() if params is None else params,
        Rule(pace, average() if apply is None else apply),
        num_workers,
        now=VirtualClock(),
        lease=lease,
        on_applied=applied.append,
    )
    task = Quadratic(num_workers, noise=0.1)
    workers = sgd_workers(task, num_workers, **worker_options)
    done = simulate(server, workers, times, trace=True, **options)
    return server, done, applied


NETWORK = Network(Link(0.01, 1e5), server_bandwidth=1e6, jitter=0.5, duplicated=0.2)


@pytest.mark.parametrize("pace", [asynchronous(), stale_synchronous(2), synchronous(), backup(1)])
def test_a_run_repeats_itself_bit_for_bit(pace):
    def once(seed):
        server, done, _ = run(
            pace, log_normal(0.5), num_workers=3, network=NETWORK, num_versions=40, seed=seed
        )
        return server.params["w"], done.trace

    (w, trace), (again, trace_again) = once(0), once(0)
    np.testing.assert_array_equal(w, again)
    assert trace == trace_again
    assert once(1)[1] != trace


def test_lockstep_takes_as_long_as_the_slowest():
    server, done, _ = run(synchronous(), np.array([[1.0, 4.0]]), num_versions=10)
    assert done.virtual_seconds == 40
    np.testing.assert_array_equal(done.computing_virtual_seconds, [10, 40])
    np.testing.assert_array_equal(done.waiting_virtual_seconds, [30, 0])
    server, done, applied = run(asynchronous(), np.array([[1.0, 4.0]]), virtual_seconds=40)
    assert done.virtual_seconds == 40
    assert server.version == 50
    assert [sum(a.worker == k for a in applied) for k in range(2)] == [40, 10]


def test_ssp_lets_the_fast_run_ahead_and_no_farther():
    """Worker 1 stops for 100: worker 0 does s more clocks and waits."""
    times = np.array([[1.0, 1.0]] * 4 + [[1.0, 100.0]] + [[1.0, 1.0]] * 59)
    for s in (0, 1, 3):
        server, _, _ = run(stale_synchronous(s), times, virtual_seconds=50)
        assert server.clock(0) == 5 + s
        assert server.clock(1) == 4


def test_messages_take_latency_and_bytes():
    """A round: ask, be sent 24 bytes, compute, send 24 bytes, be told."""
    network = Network(Link(latency=0.5, bandwidth=12.0))
    server, done, _ = run(
        asynchronous(), np.ones((1, 1)), num_workers=1, network=network, num_versions=3
    )
    there, back = 0.5 + 2, 0.5
    first = back + there + 1 + there
    assert done.virtual_seconds == first + 2 * (back + first)
    assert (server.traffic.pushed_bytes, server.traffic.pulled_bytes) == (3 * 24, 3 * 24)


def test_the_servers_link_is_shared():
    network = Network(Link(0.0, 1e9), server_bandwidth=24.0)
    _, done, _ = run(asynchronous(), np.zeros((1, 5)), num_workers=5, network=network, num_events=1)
    _, done, _ = run(
        synchronous(), np.zeros((1, 5)), num_workers=5, network=network, num_versions=1
    )
    # Five copies down one after the other, and up likewise, each as soon as it was read.
    assert done.virtual_seconds == pytest.approx(6.0, abs=1e-6)


def test_a_pipelined_worker_computes_while_its_update_travels():
    network = Network(Link(latency=1.0, bandwidth=1e9))
    rounds = {}
    for pipelined in (False, True):
        server, _, applied = run(
            asynchronous(),
            np.full((1, 1), 5.0),
            num_workers=1,
            network=network,
            virtual_seconds=1000,
            worker={"pipelined": pipelined},
        )
        rounds[pipelined] = server.version
        assert [a.clock for a in applied] == list(range(server.version))
        assert all(a.delay == pipelined for a in applied[1:])
    # 2 to read, 5 to compute; another 2 for the push and its answer, or none.
    assert rounds == {False: 1000 // 9, True: (1000 - 1) // 7}


def test_push_and_pull_at_intervals_of_their_own():
    server, done, applied = run(
        asynchronous(),
        np.ones((1, 1)),
        add(),
        num_workers=1,
        virtual_seconds=60,
        worker={"push_every": 3, "fetch_every": 5},
    )
    assert server.version == 20
    pulls = [e.virtual_seconds for e in done.trace if e.what == "pull"]
    assert pulls[:-1] == [5.0 * i for i in range(12)]
    assert server.traffic.pushes == 20
    # Read at step 5: its own updates of steps 3-5 and 6-8 are in before that of 9-11.
    assert [a.delay for a in applied[:5]] == [0, 1, 1, 2, 1]


def test_one_worker_with_intervals_is_local_sgd():
    """Alone, whatever it pushes when: the server has the sum of its steps."""
    for options in ({"push_every": 4}, {"push_every": 2, "fetch_every": 4}):
        server, _, _ = run(
            asynchronous(),
            np.ones((1, 1)),
            add(),
            num_workers=1,
            virtual_seconds=40,
            worker=options,
        )
        task, w = Quadratic(1, noise=0.1), np.zeros(3)
        for t in range(40):
            w = w - task.learning_rate * task.gradient(0, w, t)
        np.testing.assert_allclose(server.params["w"], w, rtol=1e-12)


def test_evaluations_come_when_asked_for():
    server = Server(start(), Rule(asynchronous(), average()), 2, now=VirtualClock())
    done = simulate(
        server,
        sgd_workers(Quadratic(2), 2),
        np.array([[1.0, 3.0]]),
        virtual_seconds=10,
        evaluate=lambda params: float(params["w"].sum()),
        evaluate_every_virtual_seconds=2.5,
    )
    assert [e.virtual_seconds for e in done.evaluations] == [0, 2.5, 5, 7.5, 10, 10]
    assert [e.version for e in done.evaluations] == [0, 2, 5, 9, 12, 13]
    assert done.evaluations[-1].value == server.params["w"].sum()


def test_clock_models_of_arrivals_serve():
    for model in (constant(2.0, slower={1: 3.0}), heavy_tailed(1.5), log_normal(1.0)):
        _, done, _ = run(asynchronous(), model, num_versions=80)
        assert done.virtual_seconds > 0
    _, done, _ = run(synchronous(), constant(2.0, slower={1: 3.0}), num_versions=70)
    assert done.virtual_seconds == 70 * 6


def test_a_thousand_workers():
    num = 1000
    _, done, applied = run(
        asynchronous(), log_normal(0.3), add(1 / num), num_workers=num, num_versions=5000
    )
    delays = np.array([a.delay for a in applied[2000:]])
    # In a steady state everyone else pushes about once while one computes.
    assert abs(delays.mean() - (num - 1)) < 0.05 * num
    assert 4 < done.virtual_seconds < 6


def test_a_killed_worker_holds_nobody_up_for_longer_than_its_lease():
    server, done, applied = run(
        synchronous(),
        np.ones((1, 3)),
        num_workers=3,
        lease=4.0,
        outages=[Outage(2, 10.5)],
        virtual_seconds=30,
    )
    ends = {e.virtual_seconds for e in done.trace if e.what == "pull" and e.worker == 0}
    gaps = np.diff(sorted(ends))
    assert gaps.max() <= 4.0 + 1.0 + 1.0  # lease, the look after it, the step
    assert sorted(server.members()) == [0, 1]
    assert server.version > 20
    assert max(a.clock for a in applied if a.worker == 2) == 9


def test_without_a_lease_the_run_ends_with_who_and_why():
    with pytest.raises(PaceError, match=r"workers \[0, 1\] wait; killed or frozen for good: \[2\]"):
        run(
            synchronous(),
            np.ones((1, 3)),
            num_workers=3,
            outages=[Outage(2, 10.5)],
            virtual_seconds=30,
        )


@pytest.mark.parametrize("kind", ["killed", "frozen"])
@pytest.mark.parametrize("pace", [stale_synchronous(1), asynchronous()])
def test_one_that_returns_takes_part_again(kind, pace):
    server, done, applied = run(
        pace,
        np.ones((1, 3)),
        num_workers=3,
        lease=4.0,
        network=Network(Link(0.01, 1e9)),
        outages=[Outage(2, 10.3, kind, 15.0)],
        virtual_seconds=60,
    )
    assert sorted(server.members()) == [0, 1, 2]
    assert server.members()[2].incarnation == 1
    assert len({(a.worker, a.clock) for a in applied}) == len(applied)
    assert all(a.staleness <= pace.staleness for a in applied)
    assert sum(e.what == "fenced" for e in done.trace) == (kind == "frozen")
    assert max(a.version for a in applied if a.worker == 2) > server.version - 9


def test_a_short_freeze_is_only_a_slow_step():
    server, done, _ = run(
        synchronous(), ONES, lease=4.0, outages=[Outage(1, 10.5, "frozen", 2.0)], virtual_seconds=30
    )
    assert server.members()[1].incarnation == 0
    assert server.version == 28
    assert not any(e.what == "fenced" for e in done.trace)


def test_messages_lost_in_time_count_once():
    """Duplicated and reordered: as many updates as were sent, each once."""
    network = Network(Link(0.3, 1e6), jitter=1.5, duplicated=0.4)
    server, done, applied = run(
        asynchronous(), ONES, add(), network=network, num_events=3000, worker={"pipelined": True}
    )
    assert sum(e.what == "duplicate" for e in done.trace) > 100
    assert len({(a.worker, a.clock) for a in applied}) == len(applied) == server.version


def test_refuses_what_cannot_work():
    def made(now=None, num_workers=2):
        return Server(start(), Rule(asynchronous(), add()), num_workers, now=now or VirtualClock())

    workers = sgd_workers(Quadratic(2), 2)
    with pytest.raises(ValueError, match="no end"):
        simulate(made(), workers, ONES)
    with pytest.raises(ValueError, match="measures leases in wall time"):
        simulate(Server(start(), Rule(asynchronous(), add()), 2), workers, ONES, num_events=1)
    with pytest.raises(ValueError, match="the server starts with 3"):
        simulate(made(num_workers=3), workers, ONES, num_events=1)
    with pytest.raises(ValueError, match="one column per worker"):
        simulate(made(), workers, np.ones((1, 3)), num_events=1)
    with pytest.raises(ValueError, match="times >= 0"):
        simulate(made(), workers, -ONES, num_events=1)
    with pytest.raises(ValueError, match="names no worker"):
        simulate(made(), workers, ONES, num_events=1, outages=[Outage(7, 1.0)])
    with pytest.raises(ValueError, match="'killed' or 'frozen'"):
        Outage(0, 1.0, "slow")
    with pytest.raises(ValueError, match="duplicated"):
        Network(Link(0.0, 1.0), duplicated=1.0)
    with pytest.raises(ValueError, match="push_every"):
        SgdWorker(0, Quadratic(1), push_every=0)
