"""What goes wrong in threads: who is named, who is freed when, and what is applied."""

import threading
import time

import numpy as np
import pytest

from jdml.communicate.pace import (
    PaceError,
    Rule,
    Server,
    SgdWorker,
    StaleTimeout,
    add,
    asynchronous,
    average,
    run_threads,
    synchronous,
)
from tests.communicate.pace.problems import Quadratic, sgd_workers, start

K = 3


class Failing(Quadratic):
    """Worker 1 raises at its step 5, so many times."""

    def __init__(self, times):
        super().__init__(K, noise=0.1)
        self.times = times

    def step(self, worker, params, state, index, towards=None):
        if worker == 1 and index == 5 and self.times:
            self.times -= 1
            raise FloatingPointError("the loss is no number")
        return super().step(worker, params, state, index, towards)


class Hanging(Quadratic):
    """Worker 1 hangs in its step 5 for so long, or until it is let go, once."""

    def __init__(self, seconds):
        super().__init__(K, noise=0.1)
        self.seconds, self.let_go, self.hung = seconds, threading.Event(), False

    def step(self, worker, params, state, index, towards=None):
        if worker == 1 and index == 5 and not self.hung:
            self.hung = True
            self.let_go.wait(self.seconds)
        return super().step(worker, params, state, index, towards)


def serve(rule, task, **options):
    """``(server, workers, applied updates with the time)``."""
    applied = []
    server = Server(
        start(), rule, K, on_applied=lambda a: applied.append((time.monotonic(), a)), **options
    )
    return server, sgd_workers(task, K), applied


def once_each(applied):
    seen = [(a.worker, a.clock) for _, a in applied]
    return len(set(seen)) == len(seen)


BSP = Rule(synchronous(), average())


def test_a_failure_ends_the_run_with_name_and_reason():
    server, workers, _ = serve(BSP, Failing(1))
    with pytest.raises(
        PaceError, match=r"worker 1 \(incarnation 0\) failed after 5 .*FloatingPointError: the loss"
    ) as caught:
        run_threads(server, workers, num_versions=20)
    assert isinstance(caught.value.__cause__, FloatingPointError)
    assert not [t for t in threading.enumerate() if t.name.startswith("worker")]
    # The server is as it was: the run may go on, with the failed one as a newer incarnation.
    assert sorted(server.members()) == [0, 2]
    run_threads(server, workers, num_versions=20)
    assert server.members()[1].incarnation == 1


def test_a_run_goes_on_without_the_failed():
    server, workers, applied = serve(BSP, Failing(1))
    done = run_threads(server, workers, num_versions=20, on_failure="evict")
    assert list(done.gone) == [1]
    assert "the loss is no number" in done.gone[1]
    assert sorted(server.members()) == [0, 2]
    assert sum(a.worker == 1 for _, a in applied) == 5
    assert once_each(applied)


def test_a_run_without_anybody_left_ends():
    class AllFail(Quadratic):
        def step(self, *args, **options):
            raise RuntimeError("no")

    server, workers, _ = serve(Rule(asynchronous(), add()), AllFail(K))
    with pytest.raises(PaceError, match=r"no worker is left: .*worker 2"):
        run_threads(server, workers, seconds=20, on_failure="evict")


def test_the_failed_returns_as_a_newer_incarnation():
    server, workers, applied = serve(BSP, Failing(2))
    done = run_threads(server, workers, num_versions=20, on_failure="restart", max_restarts=2)
    assert done.restarts == {1: 2}
    assert not done.gone
    assert server.members()[1].incarnation == 2
    assert once_each(applied)
    assert [w.num_steps for w in workers if w.number == 1] == [
        sum(a.worker == 1 for _, a in applied)
    ]


def test_too_many_failures_end_the_run():
    server, workers, _ = serve(BSP, Failing(100))
    with pytest.raises(PaceError, match=r"worker 1 .*started anew 2 times"):
        run_threads(server, workers, num_versions=20, on_failure="restart", max_restarts=2)


def test_a_lease_frees_the_others_and_the_late_worker_returns():
    """Worker 1 hangs for 3 s; after the lease the others go on, and then it is back."""
    lease = 1.0
    server, workers, applied = serve(BSP, Hanging(3.0), lease=lease)
    times = np.array([[0.01] * K])
    done = run_threads(server, workers, seconds=4.5, slow_down=times, rehearse=False)
    assert done.returns == {1: 1}
    assert not done.restarts
    assert not done.gone
    assert server.members()[1].incarnation == 1
    moments = np.array([t for t, _ in applied])
    # Freed within the lease and the quarter of it after which somebody looks; the rest is for a
    # busy machine.
    assert lease < np.diff(moments).max() < 1.25 * lease + 1.0
    mine = [a.clock for _, a in applied if a.worker == 1]
    assert 4 in mine
    assert 5 not in mine, "what an evicted worker had computed is not applied"
    assert len(mine) > 10, "it takes part again"
    assert max(a.staleness for _, a in applied) == 0
    assert once_each(applied)


def test_a_heartbeat_keeps_a_slow_worker_in():
    server, workers, applied = serve(BSP, Quadratic(K), lease=1.0)
    times = np.array([[0.0, 1.6, 0.0]])
    done = run_threads(server, workers, num_versions=2, slow_down=times, heartbeat=True)
    assert not done.returns
    assert len(applied) == 2 * K
    # Without one it is given up. (So may another be, on a machine that lets it wait for a second.)
    done = run_threads(server, workers, seconds=2.6, slow_down=times)
    assert done.returns[1] == 1


def test_a_replaced_incarnation_stays_away():
    """Somebody else has taken worker 1's number: it must not fence that one in turn."""
    server, workers, applied = serve(Rule(asynchronous(), add(1 / K)), Quadratic(K))
    timer = threading.Timer(0.2, server.register, (1, 7))
    timer.start()
    done = run_threads(server, workers, seconds=1.0, slow_down=np.array([[0.005] * K]))
    timer.join()
    assert list(done.gone) == [1]
    assert "7 is registered" in done.gone[1]
    assert server.members()[1].incarnation == 7
    assert done.num_steps[1] < 0.8 * done.num_steps[0]
    assert once_each(applied)


def test_who_waits_too_long_says_for_whom():
    server, workers, _ = serve(BSP, Hanging(3.0))
    with pytest.raises(StaleTimeout, match=r"worker [02] waited 1 s: .* 1 of 3 .*: \[1\]"):
        run_threads(server, workers, num_versions=20, timeout=1.0, rehearse=False)


def test_a_thread_that_does_not_stop_is_named():
    task = Hanging(20.0)
    server, workers, _ = serve(Rule(asynchronous(), add(1 / K)), task)
    with pytest.raises(PaceError, match=r"workers \[1\] have not stopped 0.1 s"):
        run_threads(server, workers, seconds=0.3, grace_seconds=0.1, rehearse=False)
    task.let_go.set()
    for thread in threading.enumerate():
        if thread.name == "worker 1":
            thread.join(10)
            assert not thread.is_alive()


def test_a_push_of_another_tree_names_the_leaf():
    class Other(Quadratic):
        def step(self, worker, *args, **options):
            update, state, loss = super().step(worker, *args, **options)
            return ({"v": update["w"]} if worker == 1 else update), state, loss

    server, workers, _ = serve(BSP, Other(K))
    with pytest.raises(PaceError, match=r"worker 1 .*missing: \['w'\], not among them: \['v'\]"):
        run_threads(server, workers, num_versions=5)


def test_a_pipelined_push_that_fails_ends_the_run_too():
    server, _, _ = serve(Rule(asynchronous(), add(1 / K)), None)

    def push(worker, *args):
        if worker == 1:
            raise ConnectionError("the line is dead")
        return type(server).push(server, worker, *args)

    server.push = push
    workers = [SgdWorker(k, Quadratic(K), pipelined=True) for k in range(K)]
    with pytest.raises(PaceError, match=r"worker 1 .*the line is dead"):
        run_threads(server, workers, seconds=20)
