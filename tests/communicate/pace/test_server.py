"""The server's interface: members, sequence numbers, waiting, leases, saving."""

import threading

import numpy as np
import pytest

from jdml.communicate import error_feedback
from jdml.communicate.codecs import int8, power_sgd
from jdml.communicate.pace import (
    Closed,
    Connection,
    Evicted,
    Rule,
    Server,
    StaleTimeout,
    add,
    async_admm,
    asynchronous,
    average,
    backup,
    dc_asgd,
    dc_asgd_adaptive,
    delayed_nesterov,
    elastic_centre,
    stale_synchronous,
    synchronous,
)

ONE = {"w": np.ones(2)}


def server(rule=None, num_workers=2, registered=True, **options):
    rule = Rule(asynchronous(), add()) if rule is None else rule
    made = Server({"w": np.zeros(2)}, rule, num_workers, **options)
    if registered:
        for worker in range(num_workers):
            made.register(worker, 0)
    return made


def step(s, worker, seq, value=1.0, incarnation=0):
    base = s.pull(worker).version
    return s.push(worker, incarnation, seq, {"w": np.full(2, value)}, base)


def test_a_snapshot_is_immutable_and_stays():
    s = server()
    before = s.pull(0)
    with pytest.raises(ValueError, match="read-only"):
        before.params["w"][0] = 1
    step(s, 1, 0)
    np.testing.assert_array_equal(before.params["w"], 0)
    np.testing.assert_array_equal(s.pull(0).params["w"], 1)
    assert (before.version, s.version) == (0, 1)


def test_initial_parameters_are_copied():
    params = {"w": np.zeros(2)}
    s = Server(params, Rule(asynchronous(), add()), 1)
    params["w"][:] = 7
    np.testing.assert_array_equal(s.params["w"], 0)


def test_nobody_reads_before_all_have_come():
    s = server(registered=False)
    s.register(0)
    with pytest.raises(StaleTimeout, match="1 of 2 workers have not registered"):
        s.pull(0, timeout=0.01)
    s.register(1)
    assert s.pull(0, timeout=0.01).version == 0


def test_a_push_counts_once_and_is_answered_alike():
    s = server()
    base = s.pull(0).version
    first = s.push(0, 0, 0, ONE, base)
    again = s.push(0, 0, 0, ONE, base)
    assert (first.accepted, first.duplicate) == (True, False)
    assert (again.accepted, again.duplicate) == (True, True)
    np.testing.assert_array_equal(s.params["w"], 1)
    assert s.clock(0) == 1
    assert s.traffic.pushes == 2
    assert s.traffic.pushed_bytes == 32  # both travelled: two f64 each


def test_a_refused_push_is_answered_alike():
    s = server(Rule(backup(1), average()))
    late = s.pull(0).version
    step(s, 1, 0)
    assert not s.push(0, 0, 0, ONE, late).accepted
    again = s.push(0, 0, 0, ONE, late)
    assert (again.accepted, again.duplicate) == (False, True)
    np.testing.assert_array_equal(s.params["w"], 1)
    assert s.clock(0) == 1


def test_a_push_that_overtakes_another_does_not_advance_the_clock():
    s = server(Rule(stale_synchronous(5), add()))
    base = s.pull(0).version
    assert s.push(0, 0, 1, ONE, base).accepted
    assert s.clock(0) == 0
    assert s.push(0, 0, 0, ONE, base).accepted
    assert s.clock(0) == 2
    assert s.push(0, 0, 1, ONE, base).duplicate
    np.testing.assert_array_equal(s.params["w"], 2)


def test_an_old_incarnation_is_fenced():
    s = server()
    base = s.pull(0).version
    assert s.register(0, 3).clock == 0
    for call in (
        lambda: s.push(0, 0, 0, ONE, base),
        lambda: s.pull(0, incarnation=0),
        lambda: s.heartbeat(0, 0),
        lambda: s.register(0, 2),
    ):
        with pytest.raises(Evicted, match="was replaced; 3 is registered"):
            call()
    np.testing.assert_array_equal(s.params["w"], 0)
    assert step(s, 0, 0, incarnation=3).accepted


def test_a_new_incarnation_goes_on_where_the_old_one_was():
    s = server()
    base = s.pull(0).version
    s.push(0, 0, 0, ONE, base)
    s.push(0, 0, 2, ONE, base)  # number 1 is lost with its worker
    assert s.register(0, 1).clock == 3
    s.evict(1)
    for seq in (3, 4, 5):
        step(s, 0, seq, incarnation=1)
    # One that was out joins at the clock of those who went on.
    assert s.register(1, 1).clock == 6


def test_the_slowest_may_be_replaced_and_is_waited_for():
    s = server(Rule(stale_synchronous(1), add()))
    step(s, 1, 0)
    assert s.register(0, 1).clock == 0
    assert s.min_clock == 0
    step(s, 1, 1)
    assert s.try_pull(1) is None
    step(s, 0, 0, incarnation=1)
    assert s.try_pull(1) is not None


def test_two_workers_with_one_number():
    with pytest.raises(ValueError, match="two workers must not share a number"):
        server().register(0, 0)


def test_eviction_frees_those_who_wait_and_tells_the_evicted():
    s = server(Rule(synchronous(), average()), num_workers=3)
    for worker in (0, 1):
        step(s, worker, 0)
    answers = {}

    def wait(worker):
        try:
            answers[worker] = s.pull(worker, timeout=20).version
        except Evicted as error:
            answers[worker] = str(error)

    threads = [threading.Thread(target=wait, args=(k,)) for k in (0, 1)]
    for t in threads:
        t.start()
    s.evict(1, "preempted")
    threads[1].join(10)
    assert "preempted" in answers[1]
    assert 0 not in answers
    s.evict(2)
    threads[0].join(10)
    assert answers[0] == 1
    np.testing.assert_array_equal(s.params["w"], 1)  # the evicted worker's update had come


def test_a_timeout_names_who_is_awaited():
    s = server(Rule(synchronous(), average()), num_workers=3)
    step(s, 1, 0)
    with pytest.raises(StaleTimeout, match=r"2 of 3 workers are at the least, 0: \[0, 2\]"):
        s.pull(1, timeout=0.01)
    with pytest.raises(StaleTimeout):
        server(num_workers=2).barrier("x", 0, timeout=0.01)


def test_a_reader_may_ask_for_less_staleness_than_the_pace():
    s = server(Rule(stale_synchronous(3), add()))
    step(s, 0, 0)
    assert s.try_pull(0) is not None
    assert s.try_pull(0, max_staleness=0) is None
    step(s, 1, 0)
    assert s.try_pull(0, max_staleness=0) is not None


def test_a_pipelined_reader_counts_what_it_has_sent():
    s = server(Rule(stale_synchronous(0), add()))
    assert s.try_pull(0, clock=0) is not None
    assert s.try_pull(0, clock=1) is None


def test_a_barrier_is_over_the_live():
    s = server(num_workers=3)
    done = []

    def come(worker):
        s.barrier("epoch", worker, timeout=20)
        done.append(worker)

    threads = [threading.Thread(target=come, args=(k,)) for k in (0, 1)]
    for t in threads:
        t.start()
    assert not done
    s.evict(2)
    for t in threads:
        t.join(10)
    assert sorted(done) == [0, 1]
    with pytest.raises(StaleTimeout, match=r"for workers \[1\]"):
        s.barrier("epoch", 0, timeout=0.01)  # the next one of that name


def test_closing_ends_every_wait():
    s = server(registered=False)
    s.register(0)
    said = []

    def wait():
        try:
            s.pull(0, timeout=20)
        except Closed as error:
            said.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    s.close("enough")
    thread.join(10)
    assert said == ["the server is closed: enough"]
    with pytest.raises(Closed):
        s.push(0, 0, 0, ONE, 0)


def test_leases_end_and_speaking_renews_them():
    time = [0.0]
    s = server(Rule(synchronous(), average()), lease=1.0, now=lambda: time[0])
    step(s, 0, 0)
    time[0] = 0.9
    s.heartbeat(0, 0)
    assert s.members()[1].silent == 0.9
    time[0] = 1.1
    assert s.expire() == [1]
    assert list(s.members()) == [0]
    assert s.pull(0, timeout=1).version == 1
    with pytest.raises(Evicted, match="lease of 1"):
        s.heartbeat(1, 0)


def test_a_worker_that_is_kept_waiting_is_not_silent():
    time = [0.0]
    s = server(Rule(synchronous(), average()), lease=1.0, now=lambda: time[0])
    step(s, 0, 0)
    version = []
    thread = threading.Thread(target=lambda: version.append(s.pull(0, timeout=20).version))
    thread.start()
    while not any(m.waiting for _, m in s._book.members.live()):
        assert thread.is_alive()
    time[0] = 0.9
    s.heartbeat(1, 0)
    time[0] = 1.5
    assert s.expire() == []
    step(s, 1, 0)
    thread.join(10)
    assert version == [1]


RULES = {
    "ssp": Rule(stale_synchronous(1), add(0.5)),
    "synchronous": Rule(synchronous(), average()),
    "backup": Rule(backup(1), average()),
    "dc_asgd": Rule(asynchronous(), dc_asgd(0.1)),
    "dc_asgd_adaptive": Rule(asynchronous(), dc_asgd_adaptive(0.1)),
    "delayed_nesterov": Rule(asynchronous(), delayed_nesterov(0.7, 0.9, 3, 0.1)),
    "elastic": Rule(stale_synchronous(2), elastic_centre(0.2)),
    "admm": async_admm(2, 2),
}


@pytest.mark.parametrize("name", RULES)
def test_restored_from_a_snapshot_bit_for_bit(name):
    """Random pushes and pulls; after half of them a second server takes the first one's place."""
    draws = np.random.default_rng(1)
    first, others = server(RULES[name], 3), []
    lines = [(0, 0, None)] * 3  # incarnation, seq, base
    for action in range(120):
        if action == 60:
            saved = first.snapshot()
            second = server(RULES[name], 3, registered=False)
            second.restore(saved)
            others.append(second)
        worker = int(draws.integers(3))
        incarnation, seq, base = lines[worker]
        update = {"w": draws.standard_normal(2)}
        for other in others:
            assert other.version == first.version
        if base is None:
            snapshots = [s.try_pull(worker) for s in (first, *others)]
            assert len({x is None for x in snapshots}) == 1
            if snapshots[0] is not None:
                base = snapshots[0].version
        else:
            acks = {s.push(worker, incarnation, seq, update, base) for s in (first, *others)}
            assert len(acks) == 1
            seq, base = seq + 1, None
        lines[worker] = (incarnation, seq, base)
    assert first.version > 10
    np.testing.assert_array_equal(first.params["w"], others[0].params["w"])
    assert first.staleness == others[0].staleness
    assert first.traffic == others[0].traffic


def test_what_happens_after_a_snapshot_does_not_change_it():
    s = server(Rule(stale_synchronous(0), add()))
    step(s, 0, 0)  # held
    saved = s.snapshot()
    step(s, 1, 0)
    assert s.version == 1
    other = server(Rule(stale_synchronous(0), add()), registered=False)
    other.restore(saved)
    assert other.version == 0
    step(other, 1, 0)
    np.testing.assert_array_equal(other.params["w"], s.params["w"])


def test_many_threads_lose_nothing():
    """Real concurrency: every update of every thread is in, once."""
    num, each = 6, 40
    s = server(num_workers=num, registered=False)

    def work(k):
        line = Connection(s, k)
        for _ in range(each):
            base = line.pull(timeout=20).version
            seq, parcel = line.encode({"w": np.array([1.0, k])})
            line.push(seq, parcel, base)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(num)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    np.testing.assert_array_equal(s.params["w"], [num * each, each * sum(range(num))])
    assert s.version == num * each
    assert s.min_clock == each


def test_refuses_another_tree():
    s = server()
    base = s.pull(0).version
    with pytest.raises(ValueError, match=r"missing: \['w'\], not among them: \['v'\]"):
        s.push(0, 0, 0, {"v": np.ones(2)}, base)
    with pytest.raises(ValueError, match=r"leaf 'w' has shape \(3,\), the parameter has \(2,\)"):
        s.push(0, 0, 0, {"w": np.ones(3)}, base)
    assert s.clock(0) == 0


def test_refuses_what_cannot_work():
    for bad in (-1, 1.5, float("nan"), True):
        with pytest.raises(ValueError, match="whole number of clocks"):
            stale_synchronous(bad)
    with pytest.raises(ValueError, match="only 2 workers"):
        server(async_admm(3, 1))
    with pytest.raises(ValueError, match="at most 1 can be spared"):
        server(Rule(backup(2), average()))
    with pytest.raises(ValueError, match="unstable"):
        server(Rule(asynchronous(), elastic_centre(0.9)), num_workers=3)
    with pytest.raises(ValueError, match="residual for every worker"):
        server(pull=error_feedback(int8()))
    with pytest.raises(ValueError, match="in lockstep"):
        server(push=power_sgd(2))
    with pytest.raises(ValueError, match="expected None, or a codec"):
        server(push="int8")
    with pytest.raises(ValueError, match="encodes floats only"):
        Server({"n": np.zeros(2, int)}, Rule(asynchronous(), add()), 1, push=int8())
    with pytest.raises(ValueError, match="expected an int >= 1"):
        server(num_workers=0, registered=False)
    with pytest.raises(ValueError, match="a pace such as"):
        Rule(add(), asynchronous())
    s = server(async_admm(1, 1), registered=False)
    with pytest.raises(ValueError, match="workers 0 to 1"):
        s.register(2)
    s = server()
    with pytest.raises(ValueError, match="has no version 0 to base an update on"):
        s.push(0, 0, 0, ONE, 0)
    with pytest.raises(Evicted, match="worker 9 is not registered"):
        s.pull(9)
    s = server(push=int8())
    with pytest.raises(ValueError, match=r"server.sender\(worker\)"):
        s.push(0, 0, 0, ONE, s.pull(0).version)
