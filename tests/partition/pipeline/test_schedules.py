"""Schedules against the closed forms of their papers, for every size that is quick to try."""

import itertools
from collections import Counter

import numpy as np
import pytest

from jdml.partition.pipeline import gpipe, interleaved, one_f_one_b, simulate, zero_bubble
from jdml.partition.pipeline.schedule import Op, in_flight, needs, place
from jdml.partition.pipeline.timetable import BRANCHES, timetable

SCHEDULES = [gpipe(), one_f_one_b(), interleaved(2), interleaved(3), zero_bubble()]
names = [schedule.name for schedule in SCHEDULES]


def sizes(schedule):
    for num_stages, micro_batches in itertools.product(range(1, 9), range(1, 27)):
        grouped = schedule.chunks == 1 or micro_batches % num_stages == 0
        if num_stages <= micro_batches and grouped:
            yield num_stages, micro_batches


@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
def test_bubble_and_activations_are_the_closed_forms(schedule):
    # ZB-H1's bubble holds while W takes no longer than F and B.
    times = [(1, 1, 1), (2, 2, 1), (3, 4, 3), (2, 2.5, 2)]
    for num_stages, micro_batches in sizes(schedule):
        for t_f, t_b, t_w in times:
            timeline = simulate(schedule, num_stages, micro_batches, t_f=t_f, t_b=t_b, t_w=t_w)
            stated = schedule.bubble(num_stages, micro_batches, t_f, t_b, t_w)
            assert timeline.bubble == pytest.approx(stated, abs=1e-12)
            assert sum(timeline.busy) == pytest.approx(
                num_stages * micro_batches * (t_f + t_b + t_w)
            )
        held = schedule.peak_activations(num_stages, micro_batches)
        assert list(timeline.peak_activations) == held


def test_what_the_closed_forms_say():
    waits = lambda schedule: schedule.bubble(4, 8, 1, 1, 1)  # noqa: E731
    assert waits(gpipe()) == waits(one_f_one_b()) == 3 / 11
    assert waits(interleaved(2)) == 3 / 19
    assert waits(zero_bubble()) == 3 / 27
    assert gpipe().peak_activations(4, 8) == [8] * 4
    assert one_f_one_b().peak_activations(4, 8) == [4, 3, 2, 1]
    assert zero_bubble().peak_activations(4, 8) == [4] * 4
    assert interleaved(2).peak_activations(4, 8)[0] == 4 + 2 * 3 + 1


@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
def test_every_operation_once_after_what_it_needs(schedule):
    for num_stages, micro_batches in [(1, 1), (2, 4), (4, 4), (3, 9), (8, 16)]:
        orders = schedule.orders(num_stages, micro_batches)
        ticks = {}
        for stage, row in enumerate(place(orders, lambda stage, op: 1.0)):
            assert all(a.end <= b.start for a, b in itertools.pairwise(row))
            for p in row:
                ticks[p.op.kind, p.op.micro_batch, p.op.chunk * num_stages + stage] = p.start
        parts = num_stages * schedule.chunks
        count = Counter(kind for kind, _, _ in ticks)
        kinds = "FBW" if schedule.splits_backward else "FB"
        assert count == {kind: parts * micro_batches for kind in kinds}
        for (kind, m, part), tick in ticks.items():
            for other, needed in needs(kind, part, parts - 1):
                assert ticks[other, m, needed] < tick


@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
def test_the_timetable_has_the_ticks_and_slots_of_the_closed_forms(schedule):
    for num_stages, micro_batches in sizes(schedule):
        table = timetable(schedule.orders(num_stages, micro_batches))
        # Every operation takes a tick: three times the same if B is split, else F and B alike.
        one = (1, 1, 1) if schedule.splits_backward else (1, 1, 0)
        stated = schedule.bubble(num_stages, micro_batches, *one)
        assert table.idle == pytest.approx(stated, abs=1e-12)
        held = table.slots["kept_for_w" if schedule.splits_backward else "kept"]
        assert held == max(schedule.peak_activations(num_stages, micro_batches))
        if schedule.splits_backward:
            assert table.slots["kept"] <= num_stages
            assert table.slots["crossing"] <= num_stages


@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
def test_what_the_slots_hold_is_there_when_it_is_read(schedule):
    """Plays the timetable with names in place of arrays."""
    num_stages, micro_batches = 4, 8
    table = timetable(schedule.orders(num_stages, micro_batches))
    column = table.columns
    last = num_stages * schedule.chunks - 1
    buffers = {
        name: [[None] * max(1, slots) for _ in range(num_stages)]
        for name, slots in table.slots.items()
    }
    for tick in range(table.ticks):
        sent = {}
        for stage in range(num_stages):
            kind = BRANCHES[column["branch"][tick, stage]]
            at = {name: column[name][tick, stage] for name in column}
            item = (at["micro_batch"], at["chunk"] * num_stages + stage)
            held = {name: rows[stage] for name, rows in buffers.items()}
            if kind == "F":
                if not at["is_first"]:
                    assert held["input"][at["input"]] == item
                held["kept"][at["kept"]] = item
                held["kept_for_w"][at["kept_for_w"]] = item
                sent[stage, "F"] = (item[0], item[1] + 1)
                assert at["is_last"] == (item[1] == last)
            elif kind == "B":
                assert held["kept"][at["kept"]] == held["gradient"][at["gradient"]] == item
                held["crossing"][at["crossing"]] = item
                sent[stage, "B"] = (item[0], item[1] - 1)
            elif kind == "W":
                assert held["kept_for_w"][at["kept_for_w"]] == item
                assert held["crossing"][at["crossing"]] == item
        for stage in range(num_stages):
            if column["output_stays"][tick, stage] >= 0:
                m, part = sent[stage, "F"]
                buffers["gradient"][stage][column["output_stays"][tick, stage]] = (m, part - 1)
            if column["input_arrives"][tick, stage] >= 0:
                arrived = sent[(stage - 1) % num_stages, "F"]
                buffers["input"][stage][column["input_arrives"][tick, stage]] = arrived
            if column["gradient_arrives"][tick, stage] >= 0:
                arrived = sent[(stage + 1) % num_stages, "B"]
                buffers["gradient"][stage][column["gradient_arrives"][tick, stage]] = arrived


def test_orders_that_cannot_run_are_refused():
    forward, backward = Op("F", 0), Op("B", 0)
    with pytest.raises(ValueError, match="waits for ever"):
        place([[forward, backward], [backward, forward]], lambda stage, op: 1.0)
    with pytest.raises(ValueError, match="occurs twice"):
        place([[forward, forward]], lambda stage, op: 1.0)
    assert in_flight([forward, Op("F", 1), backward], "B") == 2


def test_sizes_that_cannot_run_are_refused():
    with pytest.raises(ValueError, match=r"3 micro-batches for 4 stages.*micro_batches=4"):
        one_f_one_b().orders(4, 3)
    with pytest.raises(ValueError, match=r"groups of 4. Use 4 or 8"):
        interleaved(2).orders(4, 6)
    with pytest.raises(ValueError, match="at least 2"):
        interleaved(1)


def test_colouring_uses_no_more_slots_than_are_alive_at_once():
    table = timetable(gpipe().orders(2, 5))
    assert table.slots["kept"] == 5
    assert table.slots["input"] == 1
    assert np.all(table.columns["kept"] < 5)
