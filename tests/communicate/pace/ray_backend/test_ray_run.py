"""Processes that are killed, frozen, slow and lost: the run goes on, or says who and why."""

import json
import os
import signal
import threading
import time

import numpy as np
import pytest

from jdml.communicate.pace import Evicted, PaceError, Rule, add, asynchronous, stale_synchronous
from jdml.communicate.pace.ray_backend import ray_server, run_ray
from tests.communicate.pace.problems import start
from tests.communicate.pace.ray_backend.tasks import (
    Note,
    TimedWorkers,
    failing_worker,
    spmd_worker,
    wrong_worker,
)


def notes(folder):
    """By process: ``(time, worker, clock, version, delay, staleness)`` of each update, in order."""
    return {
        int(file.stem): [json.loads(line) for line in file.read_text().splitlines()]
        for file in folder.iterdir()
    }


def check_once_each(applied):
    updates = [(worker, clock) for _, worker, clock, *_ in applied]
    assert len(set(updates)) == len(updates)


class Striker:
    """Sends signals to processes of the run, each when the server has come to some version."""

    def __init__(self, server, *strikes):
        self.server, self.strikes = server, list(strikes)
        self.pids, self.times, self.over = {}, [], threading.Event()
        self.thread = threading.Thread(target=self.strike)

    def __call__(self, happening):
        if happening.what == "started":
            self.pids.setdefault(happening.who, happening.pid)

    def strike(self):
        for version, who, number in self.strikes:
            while self.server.version < version:
                if self.over.wait(0.02):
                    return
            os.kill(self.pids[who], number)
            self.times.append(time.monotonic())

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.over.set()
        self.thread.join()


def runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def happened(run, what):
    return [h.who for h in run.happenings if h.what == what]


@pytest.mark.slow
def test_workers_killed_frozen_and_slow(session, tmp_path):
    lease, bound = 3.0, 4
    rule = Rule(stale_synchronous(bound), add(0.25))
    server = ray_server(start(), rule, 3, lease=lease, on_applied=Note(tmp_path))
    strikes = [(20, "worker 1", signal.SIGKILL), (40, "worker 2", signal.SIGSTOP)]
    with Striker(server, *strikes) as struck:
        run = run_ray(
            server,
            TimedWorkers([0.02, 0.005, 0.005]),  # worker 0 is slow
            num_versions=300,
            seconds=60,
            on_happening=struck,
        )
    assert server.version >= 300
    assert run.restarts == {1: 1, 2: 1}
    assert sorted(happened(run, "failed")) == ["worker 1", "worker 2"]
    why = {h.who: h.why for h in run.happenings if h.what == "failed"}
    assert "its process ended" in why["worker 1"]
    assert "has not answered for 3 s" in why["worker 2"]
    assert not run.gone
    assert sorted(run.worker_states) == [0, 1, 2]
    # The frozen one is killed, for which Ray takes some seconds: nothing is left to come back.
    end = time.monotonic() + 30
    while runs(struck.pids["worker 2"]) and time.monotonic() < end:
        time.sleep(0.1)
    assert not runs(struck.pids["worker 2"])
    ((_, applied),) = notes(tmp_path).items()
    check_once_each(applied)
    assert applied[-1][3] == server.version
    assert len(applied) == sum(server.staleness.values())
    assert max(staleness for *_, staleness in applied) <= bound
    # Nobody came farther than the bound, and nobody was kept longer than the lease.
    times = np.array([when for when, *_ in applied])
    frozen_at = struck.times[1]
    waits = np.diff(np.concatenate([[frozen_at], times[times > frozen_at]]))
    # A second more, for processes start meanwhile on a machine of a few cores.
    assert waits.max() <= lease + 1
    server.stop()


@pytest.mark.slow
def test_shards_killed_and_frozen_are_restored(session, tmp_path):
    server = ray_server(
        start(),
        Rule(asynchronous(), add(0.5)),
        2,
        num_shards=2,
        lease=2.0,
        on_applied=Note(tmp_path),
    )
    pids = [s.place()[1] for s in server.servers]
    struck = {"server shard 0": signal.SIGKILL, "server shard 1": signal.SIGSTOP}
    restored = {who: threading.Event() for who in struck}
    enough = threading.Event()

    def note(happening):
        if happening.what == "restored":
            restored[happening.who].set()

    def clocks():
        try:
            return np.array([s.clock(worker) for s in server.servers for worker in (0, 1)])
        except Evicted:  # has not come, or not come back
            return np.full(4, -1)

    def advance():
        """Until each worker has got three more updates into each shard."""
        begin = clocks()
        while (clocks() < begin + 3).any() and not enough.wait(0.05):
            pass

    def strike():
        for (who, number), pid in zip(struck.items(), pids, strict=True):
            advance()
            os.kill(pid, number)
            restored[who].wait(60)
        advance()
        enough.set()

    striker = threading.Thread(target=strike)
    striker.start()
    try:
        run = run_ray(
            server,
            TimedWorkers([0.01, 0.01]),
            seconds=120,
            stop=enough,
            snapshot_every_seconds=0.3,
            evaluate=lambda params: None,
            evaluate_every_seconds=1.0,
            on_happening=note,
        )
    finally:
        enough.set()
        striker.join()
    assert happened(run, "lost") == happened(run, "restored") == list(struck)
    assert not run.restarts  # the workers' processes lived on, as newer incarnations
    assert sorted(run.returns) == [0, 1]
    assert min(run.returns.values()) >= 2  # once for each shard that was lost
    for pid, applied in notes(tmp_path).items():
        assert [version for _, _, _, version, *_ in applied] == list(
            range(applied[0][3], applied[-1][3] + 1)
        ), pid
        check_once_each(applied)
    assert run.evaluations[-1].version == server.version
    server.stop()


def test_a_task_that_raises_ends_the_run_with_name_and_reason(session):
    server = ray_server(start(), Rule(asynchronous(), add(0.5)), 2)
    with pytest.raises(
        PaceError, match="worker 1 failed after 3 local steps: FloatingPointError: the loss is no"
    ) as caught:
        run_ray(server, failing_worker, seconds=300, on_failure="end")
    assert isinstance(caught.value.__cause__, FloatingPointError)
    server.stop()


@pytest.mark.slow
def test_a_task_that_makes_another_worker_does_not_start(session):
    server = ray_server(start(), Rule(asynchronous(), add(0.5)), 2)
    with pytest.raises(PaceError, match=r"worker 0 could not start: .*made worker 7"):
        run_ray(server, wrong_worker, seconds=300)
    server.stop()


@pytest.mark.slow
def test_a_worker_is_a_program_on_a_mesh_of_its_own(session):
    server = ray_server({"w": np.zeros(3, np.float32)}, Rule(asynchronous(), add()), 1)
    run = run_ray(
        server,
        spmd_worker,
        num_versions=100,
        num_devices=2,
        evaluate=lambda params: np.abs(params["w"] - [1, -2, 3]).max(),
    )
    assert run.evaluations[0].value == 3
    assert run.evaluations[-1].value < 0.2
    # Another run goes on from there, with the workers' states.
    again = run_ray(
        server, spmd_worker, num_versions=110, num_devices=2, worker_states=run.worker_states
    )
    assert again.worker_states[0]["num_steps"] >= 110
    assert server.version >= 110
    server.stop()
