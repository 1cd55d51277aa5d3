"""The benchmark of SDCA runs, small, and both reach the gap at which they are compared."""

import json

import jax
import pytest

from benchmarks import sdca


@pytest.mark.parametrize("non_zeros", [None, 5], ids=["dense", "sparse"])
def test_both_reach_the_gap(non_zeros, monkeypatch):
    monkeypatch.setitem(sdca.CASES, "tiny", sdca.Case(200, 8, non_zeros, 0.1))
    options = sdca.Options(gap=1e-3, tries=1)
    with jax.enable_x64(True):
        figure = sdca.measure("tiny", "hinge", options)
    assert 0 <= figure.our_gap <= options.gap
    assert -1e-12 <= figure.their_gap <= options.gap
    assert min(figure.passes) >= 1
    assert 0 < figure.solving <= figure.ours
    assert figure.ratio == pytest.approx(figure.ours / figure.theirs)
    assert json.dumps(figure._asdict())
