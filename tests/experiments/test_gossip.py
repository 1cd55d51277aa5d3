"""The gossip experiment as a user runs it, small; what it measures of a curve."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.gossip.config import AveragingConfig, Config, TrainingConfig
from experiments.gossip.report import decay

ROOT = Path(__file__).parents[2]
TINY = [
    *("--workers", "4", "--seeds", "0", "--pairs", "2"),
    *("--graphs", "ring", "random pairs", "complete"),
    *("--averaging.elements", "256", "--averaging.rounds", "30"),
    *(
        "--averaging.compressed-rounds",
        "400",
        "--averaging.kept",
        "0.1",
        "--averaging.gamma",
        "0.3",
    ),
    *("--training.steps", "4", "--training.eval-every", "2", "--training.batch", "8"),
    *("--training.model.widths", "4", "--training.model.hidden", "8"),
]


@pytest.mark.slow
def test_a_small_run(tmp_path):
    script = ROOT / "experiments/gossip/run.py"
    result = subprocess.run(
        [sys.executable, str(script), "--out", str(tmp_path / "o"), *TINY],
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
    rows = [json.loads(x) for x in (tmp_path / "o/metrics.jsonl").read_text().splitlines()]

    def last(part, column):
        return {r["name"]: r[column] for r in rows if r["part"] == part}

    # One payload of 256 f32 for each neighbour that hears it, and round.
    payloads = {"ring": 2, "random pairs": 1, "complete": 3}
    sent = last("averaging", "bytes_sent")
    assert sent == {name: 30 * 4 * 256 * n for name, n in payloads.items()}
    assert max(last("averaging", "distance").values()) < 1e-5
    assert all(r["mean_moved"] < 1e-5 for r in rows if "mean_moved" in r)
    compressed = last("compressed", "distance")
    assert compressed["CHOCO, top-k 0.1"] < 1e-3 < 0.1 < compressed["mix, top-k 0.1"]
    assert compressed["CHOCO, int8"] < 1e-5 < 1e-4 < compressed["gossip, int8"]
    distance = last("training", "distance")
    assert distance["complete"] < 1e-5 < distance["ring"]
    assert distance["all-reduce"] == 0
    trained, exact = last("training", "loss_mean"), last("training", "bytes_sent")
    assert trained["complete"] == pytest.approx(trained["all-reduce"], rel=1e-2)
    assert exact["ring"] == 2 * exact["random pairs"] > 4 * exact["CHOCO on the ring"]
    assert "promised" in (tmp_path / "o/summary.txt").read_text()
    for name in ("averaging.png", "training.png"):
        assert (tmp_path / "o" / name).stat().st_size > 10_000


def test_the_decay_of_a_curve():
    assert decay([0.9**i for i in range(200)], 1) == pytest.approx(0.9)
    assert decay([0.5 ** (2 * (i // 2)) for i in range(40)], 2) == pytest.approx(0.5)
    slow_at_last = [0.5**i if i < 4 else 0.5**4 * 0.8 ** (i - 4) for i in range(60)]
    assert decay(slow_at_last, 1) == pytest.approx(0.8)
    assert decay([1.0, 1e-8, 2e-8, 1e-8], 1) is None
    assert decay([1.0, 0.7, 0.5, 0.3, 1e-8, 2e-8], 4) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"averaging": AveragingConfig(rounds=0)}, "--averaging.rounds must be"),
        ({"workers": 7}, "make no torus"),
        ({"training": TrainingConfig(steps=10, eval_every=3)}, "no multiple of"),
        ({"graphs": ("star",)}, "--graphs 'star' is not one of"),
        ({"seeds": ()}, "--seeds is"),
    ],
)
def test_bad_options(change, message):
    with pytest.raises(ValueError, match=message):
        Config(**change)


def test_the_torus_is_as_square_as_can_be():
    assert [Config(workers=n).rows for n in (4, 8, 12, 16)] == [2, 2, 3, 4]
