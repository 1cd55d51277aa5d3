"""The benchmark of distributed linear models runs, small."""

import json

import jax
import pytest

from benchmarks import cocoa


@pytest.mark.slow
def test_rounds_and_times(monkeypatch):
    monkeypatch.setattr(cocoa, "WORKERS", (1, 4))
    monkeypatch.setattr(cocoa, "LOSSES", {"logistic": cocoa.LOSSES["logistic"]})
    measured = "CoCoA+, measured σ'"
    monkeypatch.setattr(cocoa, "METHODS", {measured: cocoa.METHODS[measured]})
    whole = cocoa.data
    monkeypatch.setattr(cocoa, "data", lambda n, d: whole(min(n, 400), min(d, 5)))
    options = cocoa.Options(
        samples=200, features=5, sparse_features=30, non_zeros=4, strengths=(0.1,),
        sparse_strengths=(0.1,), tries=1,
    )  # fmt: skip
    with jax.enable_x64(True):
        rounds, times = cocoa.measure_rounds(options), cocoa.measure_times(options)
    assert len(rounds) == 2 * 2
    assert cocoa.table_of_rounds(options, rounds).row_count == 2
    assert all(r.converged and (r.bytes > 0) == (r.workers > 1) for r in rounds)
    assert [t.method for t in times][:3] == ["consensus", "giant", "dane"]
    assert cocoa.table_of_times(times).row_count == len(times)
    for t in times[:3]:
        assert -1e-12 <= t.relative_error <= 1e-6
        assert t.seconds > 0
    assert json.dumps([r._asdict() for r in (*rounds, *times)])
