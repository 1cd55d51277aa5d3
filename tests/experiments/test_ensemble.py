"""The ensemble experiment as a user runs it, small."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.ensemble.config import Config
from experiments.ensemble.run import METHODS

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "experiments/ensemble/run.py"
TINY = [
    *("--workers", "2", "--alphas", "1.0", "--seeds", "0", "1", "--rounds", "2"),
    *("--local-steps", "2", "--distill-steps", "2", "--num-batches", "2", "--batch", "8"),
    *("--model.widths", "4", "4", "--model.hidden", "8"),
]


@pytest.mark.slow
def test_a_small_run(tmp_path):
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(tmp_path / "out"), *TINY],
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache/jax"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        },
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [json.loads(x) for x in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == len(METHODS) * 2 * 3  # seeds, and round 0
    for row in rows:
        assert 0 <= row["one_model"] <= 1
        assert row["ensemble"] >= 0
    sent = {row["method"]: row["bytes_sent"] for row in rows if row["round"] == 2}
    model = 4 * (9 * 4 + 4 + 9 * 4 * 4 + 4 + (4 * 4 * 4 + 1) * 8 + (8 + 1) * 10)
    answers = 16 * 10 * 4
    assert sent == {
        "averaging": 2 * model,  # twice 2 (K-1)/K of it, which is once for two workers
        "EC-DNN": 2 * (16 * 64 + answers),
        "EC-DNN, inputs shared": 2 * (16 * 64 + 2 * answers),
    }
    # After an average the models are one; before it they were not.
    averaged = [r for r in rows if r["method"] == "averaging" and r["round"]]
    assert all(r["one_model"] == r["ensemble"] for r in averaged)
    assert "EC-DNN, inputs shared: one model" in (tmp_path / "out/summary.txt").read_text()
    assert (tmp_path / "out/ensemble.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("change", "message"), [({"rounds": 0}, "--rounds must be"), ({"seeds": ()}, "--seeds is")]
)
def test_bad_options(change, message):
    with pytest.raises(ValueError, match=message):
        Config(**change)
