"""What topologies are understood, and which links an axis gets."""

import pytest

from jdml.plan import Layout, parse_topology
from jdml.plan.hardware import CHIPS


@pytest.mark.parametrize(
    ("text", "chips", "groups"),
    [
        ("v5e:16x16", 256, 1),
        ("v5p:8x8x16", 1024, 1),
        ("2*v5e:16x16", 512, 2),
        ("V6E:4x4", 16, 1),
        ("h100:64", 64, 8),
        ("a100:4", 4, 1),
    ],
)
def test_understood(text, chips, groups):
    topology = parse_topology(text)
    assert (topology.num_chips, topology.num_groups) == (chips, groups)
    assert parse_topology(str(topology)) == topology


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("v7x:4x4", "unknown chip 'v7x'; one of v5e, v5p, v6e, a100"),
        ("16x16", "expected CHIP:SHAPE"),
        ("v5e:4x4x4", "2 dims"),
        ("v5p:4x4", "3 dims"),
        ("v5e:32x16", "several slices"),
        ("v5e:0x4", "at least 1"),
        ("h100:8x8", "number alone"),
        ("h100:12", "8 or 16"),
    ],
)
def test_refused(text, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        parse_topology(text)


def test_every_chip_has_figures_and_their_source():
    for name, chip in CHIPS.items():
        assert chip.name == name
        assert chip.source
        # Operations for each byte from memory: 150 to 600 for all accelerators of these years.
        assert 100 < chip.flops / chip.memory_bandwidth < 600
        assert chip.slow_bandwidth < chip.link_bandwidth < chip.memory_bandwidth


@pytest.mark.parametrize(
    ("text", "layout", "links"),
    [
        # Both dims of a full pod close into rings: four links for one axis, two each for two.
        ("v5e:16x16", Layout(fsdp=256), {"fsdp": 4}),
        ("v5e:16x16", Layout(data=16, fsdp=16), {"data": 2, "fsdp": 2}),
        # Parts of a dim, and dims that do not close, have one link.
        ("v5e:16x16", Layout(fsdp=64, model=4), {"model": 1}),
        ("v5e:4x4", Layout(fsdp=4, model=4), {"fsdp": 1, "model": 1}),
        ("v5e:16x16", Layout(fsdp=32, model=8), {"model": 1, "fsdp": 3}),
        ("v5p:8x8x16", Layout(fsdp=1024), {"fsdp": 6}),
        ("v5p:8x8x16", Layout(fsdp=128, model=8), {"fsdp": 4, "model": 2}),
    ],
)
def test_links(text, layout, links):
    topology = parse_topology(text)
    speeds = topology.links(layout.sizes)
    for axis, count in links.items():
        assert speeds[axis] == count * topology.chip.link_bandwidth, axis


def test_the_last_axis_lies_closest_together():
    spans = Layout(data=4, fsdp=4, model=4).spans(parse_topology("h100:64"))
    assert spans == {"data": (1, 4), "fsdp": (2, 2), "model": (4, 1)}
    spans = Layout(data=2, fsdp=16).spans(parse_topology("2*v5e:4x4"))
    assert spans == {"data": (1, 2), "fsdp": (16, 1), "model": (1, 1)}
