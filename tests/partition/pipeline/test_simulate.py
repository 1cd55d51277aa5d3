"""Timelines as printed and drawn, unequal stages, and the compiled program's lockstep."""

import io

import pytest
from rich.console import Console

from jdml.partition.pipeline import draw, gpipe, interleaved, one_f_one_b, simulate, zero_bubble


def test_text_is_to_scale():
    assert str(simulate(one_f_one_b(), 2, 3)).splitlines() == [
        "F0F1····B0  F2B1  ··B2",
        "··F0B0  F1B1  F2B2",
    ]


def test_rich_prints_bubble_and_activations():
    out = io.StringIO()
    console = Console(file=out, width=100)
    console.print(simulate(interleaved(2), 4, 8))
    text = out.getvalue()
    assert "interleaved 1F1B, 2 chunks: 28.5 in all, bubble 15.8%" in text
    assert "11 / 2" in text
    assert "84.2%" in text
    console.print(simulate(gpipe(), 4, 200))  # too long for numbers: still a line for each stage
    assert max(map(len, out.getvalue().splitlines())) <= 100


def test_the_stage_with_most_layers_sets_the_pace():
    even = simulate(one_f_one_b(), 4, 32)
    uneven = simulate(one_f_one_b(), 4, 32, layers=[3, 2, 2, 1])
    assert uneven.busy == pytest.approx([32 * 3 * n / 2 for n in (3, 2, 2, 1)])
    assert uneven.span > even.span
    assert uneven.bubble > even.bubble


def test_lockstep_costs_what_differs_within_a_tick():
    """1F1B does F on one stage while a neighbour does B; with B split, ticks are alike."""
    for schedule, factor in ((gpipe(), 1.0), (zero_bubble(), 1.0), (one_f_one_b(), 4 / 3)):
        free = simulate(schedule, 4, 256)
        locked = simulate(schedule, 4, 256, lockstep=True)
        assert locked.span / free.span == pytest.approx(factor, rel=0.02)
    transfers = simulate(gpipe(), 4, 8, lockstep=True, transfer=0.5)
    assert transfers.span == simulate(gpipe(), 4, 8).span + 0.5 * (2 * 11 - 1)


def test_transfers_delay():
    assert simulate(gpipe(), 4, 4, transfer=0.25).span == pytest.approx(7 * 3 + 6 * 0.25)


def test_draws(tmp_path):
    file = tmp_path / "timeline.png"
    figure = draw([simulate(gpipe(), 2, 2), simulate(zero_bubble(), 2, 2)], file)
    assert file.stat().st_size > 1000
    bars = [len(axes.patches) for axes in figure.axes]
    assert bars == [8, 12]
    assert "bubble 33.3%" in figure.axes[0].get_title(loc="left")


def test_refuses_times_and_layers_that_make_no_sense():
    with pytest.raises(ValueError, match="expected times over 0"):
        simulate(gpipe(), 2, 2, t_f=0)
    with pytest.raises(ValueError, match="layers of each of 4 parts"):
        simulate(interleaved(2), 2, 2, layers=[1, 2])
