"""Meshes that divide, and why others do not."""

import dataclasses

import pytest

from jdml.plan import Layout, layouts, parse_topology
from jdml.plan.candidates import refusal
from jdml.plan.layout import divided_config, parse_layout, schedule_of

SEQ = 64
POD = parse_topology("v5e:2x4")


@pytest.fixture(scope="module")
def mixture(config):
    return dataclasses.replace(config, num_experts=4)


def test_all_that_divide_and_no_others(config):
    found = layouts(config, POD, 8, SEQ)
    assert len(found) == len(set(found))
    every = {
        Layout(data, fsdp, model, seq=seq)
        for data in (1, 2, 4, 8)
        for fsdp in (1, 2, 4, 8)
        for model in (1, 2, 4, 8)
        for seq in (1, 2, 4, 8)
        if data * fsdp * model * seq == 8
    }
    # Four key heads are not divided by 8, and three layers by three stages alone.
    assert set(found) == {one for one in every if one.model <= 4}
    for one in every:
        assert (refusal(one, config, POD, 8, SEQ) is None) == (one in found)


def test_pipelines_with_every_number_of_micro_batches(config):
    four = dataclasses.replace(config, num_layers=4)
    found = [one for one in layouts(four, POD, 16, SEQ) if one.stage == 2 and one.data == 2]
    assert {one.micro_batches for one in found if one.fsdp == 2} == {2, 4}
    assert {one.micro_batches for one in found if one.model == 2} == {2, 4, 8}
    round_trip = layouts(four, POD, 16, SEQ, "interleaved:2")
    assert {one.stage for one in round_trip} == {1, 2}


def test_experts_are_divided_where_there_are_any(config, mixture):
    assert {one.expert for one in layouts(config, POD, 8, SEQ)} == {1}
    assert {one.expert for one in layouts(mixture, POD, 8, SEQ)} == {1, 2, 4}


def test_slices_are_crossed_by_data_or_stages(config):
    topology = parse_topology("2*v5e:2x4")
    four = dataclasses.replace(config, num_layers=4)
    found = layouts(four, topology, 16, SEQ)
    assert found
    assert all(one.data % 2 == 0 or one.stage % 2 == 0 for one in found)
    crossing = {tuple(one.crossing(topology).items()) for one in found}
    assert crossing == {(("data", 2),), (("stage", 2),)}
    for one in found:
        ((axis, _),) = one.crossing(topology).items()
        assert {a for a, (_, across) in one.spans(topology).items() if across > 1} == {axis}


@pytest.mark.parametrize(
    ("layout", "batch", "words"),
    [
        (Layout(8), 12, "does not divide the batch"),
        (Layout(1, 1, 8), 8, "num_kv_heads=4"),
        (Layout(4), 8, "is 4 chips"),
        (
            Layout(4, stage=2, micro_batches=2),
            8,
            "num_layers=3; the nearest that they divide: 2 or 4",
        ),
        (Layout(1, stage=8, micro_batches=8), 8, "num_layers=3; the nearest that they divide: 8"),
        (Layout(4, expert=2), 8, "num_experts=None"),
        (Layout(4, seq=2, micro_batches=2), 8, "without a pipeline"),
    ],
)
def test_a_refusal_names_what_stands_in_the_way(config, layout, batch, words):
    assert words in refusal(layout, config, POD, batch, SEQ)


@pytest.mark.parametrize(
    ("layout", "changes", "words"),
    [
        (
            Layout(4, stage=2, micro_batches=1),
            {"num_layers": 4},
            "1 micro-batches for 2 stages",
        ),
        (
            Layout(4, stage=2, micro_batches=3),
            {"num_layers": 4},
            "do not divide the 2 samples of each part",
        ),
        (
            Layout(4, stage=2, micro_batches=2, schedule="interleaved:2"),
            {"num_layers": 6},
            "with 2 chunks each does not divide num_layers=6; the nearest that they divide: 4 or 8",
        ),
        (Layout(1, expert=8), {"num_experts": 4}, "sizes that do: 1, 2, 4"),
        (Layout(1, seq=8), {}, "2 × 8 chunks"),
        (
            Layout(2, seq=4),
            {"num_heads": 2, "num_kv_heads": 2, "attention": "ulysses", "flatten_tokens": False},
            "does not divide 2 (num_heads=2, model=1)",
        ),
        (Layout(4, seq=2), {"num_experts": 4, "capacity_factor": 1.25}, "dropless"),
    ],
)
def test_what_the_new_axes_do_not_divide(config, layout, changes, words):
    changed = dataclasses.replace(config, **changes)
    assert words in refusal(layout, changed, POD, 8, 56)


def test_a_pipeline_whose_words_the_axis_would_not_divide(config):
    """Its tables are whole, so that 4,097 words are no obstacle to it."""
    odd = dataclasses.replace(config, vocab_size=4097, num_layers=4)
    assert "vocab_size=4097" in refusal(Layout(4, model=2), odd, POD, 8, SEQ)
    assert refusal(Layout(2, model=2, stage=2, micro_batches=2), odd, POD, 8, SEQ) is None


def test_stages_hand_on_what_routers_lose(mixture):
    four = dataclasses.replace(mixture, num_layers=4, balance_weight=0.01, z_weight=0.001)
    assert refusal(Layout(4, stage=2, micro_batches=2), four, POD, 8, SEQ) is None


def test_a_batch_that_nothing_divides(config):
    with pytest.raises(ValueError, match="data × fsdp is at least 2; take a batch that is a mult"):
        layouts(config, POD, 7, 7)


def test_a_divided_sequence_goes_in_rings(config):
    ran = divided_config(config, Layout(seq=2))
    assert (ran.attention, ran.seq_order, ran.flatten_tokens) == ("ring", "zigzag", False)
    chosen = dataclasses.replace(config, attention="ulysses", flatten_tokens=False)
    assert divided_config(chosen, Layout(seq=2)) == chosen
    assert divided_config(config, Layout(fsdp=2)) == config


@pytest.mark.parametrize(
    ("text", "layout"),
    [
        ("1x64x4", Layout(1, 64, 4)),
        ("fsdp=64,model=4", Layout(1, 64, 4)),
        ("stage=4, micro_batches=16", Layout(stage=4, micro_batches=16)),
        ("expert=8,seq=2", Layout(expert=8, seq=2)),
    ],
)
def test_meshes_are_read(text, layout):
    assert parse_layout(text) == layout


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1x2", "as in 1x64x4"),
        ("rows=4", "data, stage, fsdp, expert, seq, model"),
        ("fsdp=4,fsdp=2", "by name"),
        ("fsdp=0", "at least 1"),
        ("stage=4", "stage=4,micro_batches=16"),
    ],
)
def test_meshes_that_are_not_understood(text, words):
    with pytest.raises(ValueError, match=words):
        parse_layout(text)


@pytest.mark.parametrize("name", ["2f2b", "interleaved", "interleaved:1"])
def test_schedules_that_are_not_known(name):
    with pytest.raises(ValueError, match="gpipe, 1f1b, interleaved:CHUNKS, zero_bubble"):
        schedule_of(name)
