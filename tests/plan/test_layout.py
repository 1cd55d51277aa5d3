"""Mesh shapes that divide, and why others do not."""

import pytest

from jdml.plan import Layout, layouts, parse_topology
from jdml.plan.layout import refusal


def test_all_that_divide_and_no_others(config):
    topology = parse_topology("v5e:2x4")
    found = layouts(config, topology, 8)
    assert len(found) == len(set(found))
    every = {
        Layout(data, fsdp, model)
        for data in (1, 2, 4, 8)
        for fsdp in (1, 2, 4, 8)
        for model in (1, 2, 4, 8)
        if data * fsdp * model == 8
    }
    # Four key heads are not divided by 8.
    assert set(found) == {one for one in every if one.model <= 4}
    for one in every:
        assert (refusal(one, config, topology, 8) is None) == (one in found)


def test_slices_are_crossed_by_data_alone(config):
    found = layouts(config, parse_topology("2*v5e:2x4"), 16)
    assert found
    assert all(one.data % 2 == 0 for one in found)


@pytest.mark.parametrize(
    ("layout", "batch", "words"),
    [
        (Layout(8), 12, "does not divide the batch"),
        (Layout(1, 1, 8), 8, "num_kv_heads=4"),
        (Layout(4), 8, "is 4 chips"),
    ],
)
def test_a_refusal_names_what_stands_in_the_way(config, layout, batch, words):
    assert words in refusal(layout, config, parse_topology("v5e:2x4"), batch)


def test_a_batch_that_nothing_divides(config):
    with pytest.raises(ValueError, match="data × fsdp is at least 2; take a batch that is a mult"):
        layouts(config, parse_topology("v5e:2x4"), 7)
