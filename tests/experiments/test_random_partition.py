"""The random-partition experiment as a user runs it, small."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.random_partition.config import Config

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "experiments/random_partition/run.py"
TINY = [
    *("--workers", "2", "--seeds", "0", "--width", "8", "--blocks", "2", "--steps", "4"),
    *("--local-steps", "2", "--batch", "8", "--learning-rates", "0.01", "--backbones", "0", "0.5"),
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
    last = {row["division"]: row for row in rows if row["step"] == 4}
    # By tensor and by layer the network is the one of one device.
    for name in ("by tensor", "by layer"):
        assert last[name]["loss"] == pytest.approx(last["one device"]["loss"], rel=1e-5)
    # A subnet of 4 of 8 units travels to one other worker in each of two rounds, with the losses.
    subnet = (64 * 4 + 4) + 2 * (4 * 4 + 4) + (4 * 10 + 10)
    assert last["at random, backbone 0%"]["bytes_sent"] == 2 * (4 * subnet + 4 * 2)
    assert last["at random, backbone 50%"]["bytes_sent"] > 2 * 4 * subnet
    assert "by layer" in (tmp_path / "out/summary.txt").read_text()
    assert (tmp_path / "out/random_partition.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"steps": 25}, "whole rounds"),
        ({"blocks": 3}, "--blocks 3 is divided over 4 workers"),
        ({"width": 0}, "--width must be at least 1"),
    ],
)
def test_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Config(**kwargs)
