"""The benchmark of distributed linear models runs, small."""

import json

import jax
import pytest

from benchmarks import cocoa


@pytest.mark.usefixtures("compiled_lightly")
def test_rounds_and_times(monkeypatch):
    monkeypatch.setattr(cocoa, "WORKERS", (1, 4))
    whole = cocoa.data
    monkeypatch.setattr(cocoa, "data", lambda n, d: whole(min(n, 400), min(d, 5)))
    options = cocoa.Options(samples=200, features=5, strengths=(0.1,), tries=1)
    with jax.enable_x64(True):
        rounds, times = cocoa.measure_rounds(options), cocoa.measure_times(options)
    assert all(r.converged and (r.bytes > 0) == (r.workers > 1) for r in rounds)
    assert [t.method for t in times] == ["consensus", "giant", "dane"]
    for t in times:
        assert -1e-12 <= t.relative_error <= 1e-6
        assert t.seconds > 0
    assert json.dumps([r._asdict() for r in (*rounds, *times)])
