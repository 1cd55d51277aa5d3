import io

import pytest
from rich.console import Console

from benchmarks import tensor
from benchmarks.step import in_turns
from jdml.models import TransformerConfig


@pytest.mark.slow
def test_times_one_device_and_divided_layers(monkeypatch):
    monkeypatch.setattr(tensor, "CASES", {"tensor": tensor.CASES["tensor"]})
    config = TransformerConfig(
        vocab_size=16, num_layers=3, embed_dim=8, num_heads=2, num_kv_heads=2, head_dim=8,
        mlp_dim=8, remat="none",
    )  # fmt: skip
    runs, programs = tensor.contenders(config, 2, 8)
    out = io.StringIO()
    tensor.show(Console(file=out, width=140), config, in_turns(runs, rounds=1), programs)
    assert "one device" in out.getvalue()
    assert "4 all-reduce" in out.getvalue()  # two forward, two backward, and no others
