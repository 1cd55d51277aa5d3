import io

import pytest
from rich.console import Console

from benchmarks import pipeline
from benchmarks.step import in_turns
from jdml.models import TransformerConfig


@pytest.mark.slow
def test_times_one_device_and_pipelines(monkeypatch):
    cases = {name: pipeline.CASES[name] for name in ("interleaved, 2 chunks",)}
    monkeypatch.setattr(pipeline, "CASES", cases)
    config = TransformerConfig(
        vocab_size=16, num_layers=8, embed_dim=8, num_heads=1, num_kv_heads=1, head_dim=8, mlp_dim=8
    )
    runs, pipes = pipeline.contenders(config, 8, 4, 8)
    out = io.StringIO()
    pipeline.show(Console(file=out, width=140), in_turns(runs, rounds=1), pipes)
    assert "one device" in out.getvalue()
    assert "15.8%" in out.getvalue()  # 3 / (8 · 2 + 3), as the closed form says
