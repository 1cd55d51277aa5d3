"""The staleness bound, over random schedules that nobody would think of."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdml.communicate.pace import (
    Evicted,
    Rule,
    Server,
    VirtualClock,
    add,
    average,
    backup,
    simulate,
    stale_synchronous,
)
from tests.communicate.pace.problems import Quadratic, sgd_workers, start

NUM_SCHEDULES = 10_000


@pytest.mark.slow
def test_ssp_bounds_hold_over_ten_thousand_schedules():
    """Each pull sees what SSP guarantees, and nothing that it excludes.

    Worker k's updates count themselves in ``w[k]``. At clock c with bound s a pull must see, of
    every other worker, the updates of clocks up to ``c - s - 1`` and none beyond ``c + s - 1``, and
    all of its own.
    """
    met = {"schedules": 0, "pulls": 0, "refused": 0}

    @settings(max_examples=NUM_SCHEDULES, deadline=None, derandomize=True, database=None)
    @given(
        num=st.integers(1, 4),
        s=st.integers(0, 3),
        turns=st.binary(min_size=28, max_size=28),
    )
    def hold(num, s, turns):
        server = Server(np.zeros(num), Rule(stale_synchronous(s), add()), num)
        unit = np.eye(num)
        for k in range(num):
            server.register(k)
        clock, base = [0] * num, [None] * num
        met["schedules"] += 1
        for turn in turns:
            k = turn % num
            if base[k] is None:
                snapshot = server.try_pull(k)
                if snapshot is None:
                    met["refused"] += 1
                    assert clock[k] - min(clock) > s
                    continue
                seen, c = snapshot.params, clock[k]
                assert c - min(clock) <= s
                assert seen[k] == c
                assert seen.min() >= min(c - s, c)
                assert seen.max() <= max(c + s, c)
                base[k] = snapshot.version
                met["pulls"] += 1
            else:
                assert server.push(k, 0, clock[k], unit[k], base[k]).accepted
                clock[k], base[k] = clock[k] + 1, None
        assert max(server.staleness, default=0) <= s

    hold()
    assert met["schedules"] >= NUM_SCHEDULES
    assert met["pulls"] > 5 * NUM_SCHEDULES
    assert met["refused"] > NUM_SCHEDULES  # the bound did bind


@pytest.mark.parametrize("pace", [stale_synchronous(2), stale_synchronous(math.inf), backup(1)])
def test_nothing_counts_twice_whatever_the_network_and_the_workers_do(pace):
    """Duplicates, reordering, two pushes in flight, evictions, incarnations old and new."""
    late = fenced = duplicates = 0
    for schedule in range(400):
        draws = np.random.default_rng([schedule, 1])
        num = int(draws.integers(2, 5))
        applied = []
        server = Server(
            np.zeros(num), Rule(pace, add()), num, now=lambda: 0.0, on_applied=applied.append
        )
        clock = [server.register(k).clock for k in range(num)]
        incarnation = [0] * num
        wire = []
        for _ in range(60):
            k = int(draws.integers(num))
            action = draws.random()
            try:
                if action < 0.5:
                    snapshot = server.try_pull(k, clock=clock[k])
                    if snapshot is not None:
                        message = (k, incarnation[k], clock[k], np.eye(num)[k], snapshot.version)
                        wire += [message] * int(draws.integers(1, 3))
                        clock[k] += 1
                elif action < 0.93 and wire:
                    message = wire.pop(int(draws.integers(len(wire))))
                    ack = server.push(*message)
                    duplicates += ack.duplicate
                    late += not ack.accepted
                elif action > 0.97:
                    incarnation[k] += 1
                    clock[k] = server.register(k, incarnation[k]).clock
                elif action > 0.96:
                    server.evict(k)
            except Evicted:
                fenced += 1
        # One clock of one worker is one update, over all its lives.
        assert len({(a.worker, a.clock) for a in applied}) == len(applied)
        counted = [sum(a.worker == k for a in applied) for k in range(num)]
        scale = 1.0
        np.testing.assert_array_equal(server.params, np.array(counted) * scale)
        if isinstance(getattr(pace, "staleness", None), int):
            assert all(a.staleness <= pace.staleness for a in applied)
        else:
            assert pace != backup(1) or all(a.delay == 0 for a in applied)
    assert duplicates > 100
    assert fenced > 100
    assert late > 0 or pace != backup(1)


@pytest.mark.slow
def test_no_applied_update_is_staler_than_the_bound_in_virtual_time():
    """Ten thousand schedules: workers, bounds, and what each step of each worker takes."""
    reached = {s: 0 for s in range(5)}
    met = {"schedules": 0, "applied": 0}

    @settings(max_examples=NUM_SCHEDULES, deadline=None, derandomize=True, database=None)
    @given(
        num=st.integers(2, 5),
        s=st.sampled_from(sorted(reached)),
        durations=st.binary(min_size=20, max_size=20),
    )
    def hold(num, s, durations):
        applied = []
        server = Server(
            start(),
            Rule(stale_synchronous(s), average()),
            num,
            now=VirtualClock(),
            on_applied=applied.append,
        )
        # From 0.1 to 10, on a logarithmic scale; worker k's steps take column k's, in turn.
        times = 10.0 ** (np.frombuffer(durations, np.uint8).reshape(4, 5)[:, :num] / 127.5 - 1)
        simulate(server, sgd_workers(Quadratic(num), num), times, num_events=40)
        most = max(a.staleness for a in applied)
        assert most <= s
        assert sum(server.staleness.values()) == len(applied)
        reached[s] = max(reached[s], most)
        met["schedules"] += 1
        met["applied"] += len(applied)

    hold()
    assert met["schedules"] >= NUM_SCHEDULES
    assert met["applied"] > 10 * NUM_SCHEDULES
    assert all(reached[s] == s for s in reached)
