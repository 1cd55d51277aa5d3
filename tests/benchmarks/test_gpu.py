"""The GPU benchmark's code at a tiny size on CPU: its own path, no figure of it."""

import numpy as np
import pytest

from benchmarks import gpu
from benchmarks.time_to_loss.problem import Shape
from benchmarks.transformer import draw_weights

TINY = Shape(
    vocab_size=64, num_layers=1, embed_dim=32, num_heads=2, num_kv_heads=1, head_dim=16, mlp_dim=48
)


def test_without_a_gpu_it_says_so_and_ends(capsys):
    gpu.main(gpu.Options())
    assert "no GPU here" in capsys.readouterr().out


@pytest.mark.slow
def test_every_form_is_tried_and_those_that_run_agree():
    tokens = gpu.draw_tokens(TINY, 2, 16)
    rows = gpu.ours(TINY, draw_weights(TINY), tokens, tuple(gpu.FORMS), rounds=1)
    ran = {row.name: row.losses for row in rows if row.seconds is not None}
    assert set(ran) == {"jdml, full", "jdml, xla", "jdml, blocks"}
    assert "cudnn" in next(row.failed for row in rows if row.seconds is None)
    gpu.check_losses(rows)
    np.testing.assert_allclose(ran["jdml, xla"], ran["jdml, full"], rtol=5e-3)
    gpu.report(rows, gpu.Options(batch=2, seq=16), "NVIDIA H100 80GB HBM3")


def test_flops_and_peak():
    """A billion parameters; 6 FLOPs each and a few per cent of scores."""
    per_token = gpu.flops_per_token(gpu.BILLION, 2048)
    assert 6.0e9 < per_token < 8.0e9
    assert gpu.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert gpu.peak_flops("a card nobody knows") is None
