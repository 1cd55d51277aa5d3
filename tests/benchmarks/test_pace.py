"""The benchmark of the pace, small: what it measures, and what it says of a target missed."""

import json
import sys

import numpy as np
import pytest

from benchmarks import pace
from benchmarks.pace import Figure


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(pace, "NUM_BYTES", 200_000)
    monkeypatch.setattr(pace, "TRIES", 3)
    monkeypatch.setattr(pace, "NUM_EVENTS", 1000)
    monkeypatch.setattr(pace, "STRAGGLER_SECONDS", 0.2)


def test_every_row_is_measured_in_its_unit(small):
    figures = [
        figure
        for row in (pace.server_row, pace.straggler_row, pace.virtual_row)
        for figure in row()
    ]
    assert [f.unit for f in figures] == ["ms", "ms", "of alone", "events/s", "events/s"]
    assert all(np.isfinite(f.value) and f.value > 0 for f in figures)


def test_the_tree_has_the_bytes_that_are_named():
    tree = pace.fifty_megabytes()
    assert sum(x.nbytes for x in tree.values()) == pytest.approx(50e6, rel=1e-3)
    assert len({x.shape for x in tree.values()}) == len(tree)


@pytest.mark.parametrize(
    ("figure", "missed"),
    [
        (Figure("", 61.0, "ms", 60.0), True),
        (Figure("", 60.0, "ms", 60.0), False),
        (Figure("", 0.94, "of alone", 0.95, "at least"), True),
        (Figure("", 0.96, "of alone", 0.95, "at least"), False),
        (Figure("", 1e9, "ms"), False),
    ],
)
def test_a_missed_target(figure, missed):
    assert figure.missed is missed


def test_what_is_written_and_what_a_missed_target_ends_with(monkeypatch, tmp_path):
    rows = {
        "good": lambda: [Figure("a", 1.0, "ms", 2.0, note="so")],
        "bad": lambda: [Figure("b", 3.0, "ms", 2.0)],
    }
    monkeypatch.setattr(pace, "rows", lambda: rows)
    path = tmp_path / "figures.json"
    monkeypatch.setattr(sys, "argv", ["pace", "good", "--json", str(path)])
    pace.main()
    (row,) = json.loads(path.read_text())["rows"]
    assert row == {
        "name": "a",
        "value": 1.0,
        "unit": "ms",
        "target": 2.0,
        "sense": "at most",
        "note": "so",
        "missed": False,
    }
    monkeypatch.setattr(sys, "argv", ["pace", "--json", str(path)])
    with pytest.raises(SystemExit, match="missed the target: b"):
        pace.main()
    assert len(json.loads(path.read_text())["rows"]) == 2
    monkeypatch.setattr(sys, "argv", ["pace", "other"])
    with pytest.raises(SystemExit, match="other: not among good, bad"):
        pace.main()
