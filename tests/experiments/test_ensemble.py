"""The ensemble experiment as a user runs it, small; its data; what it says when things lack."""

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.ensemble.config import Config
from experiments.ensemble.run import METHODS, divide, read_digits
from jdml.sharding import make_mesh

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


def test_test_images_are_no_ones_and_workers_keep_to_their_own():
    config = Config(workers=4, batch=16)
    images, labels = read_digits(config)
    assert images.shape == (1797, 8, 8, 1)
    assert images.max() == 16
    mesh = make_mesh({"data": 4}, devices=jax.devices()[:4])
    digits = divide(config, images, labels, 0.3, 0, mesh)
    assert len(digits.test_images) == 360
    seen = [set() for _ in range(4)]
    counts = np.zeros((4, 10))
    for batch in islice(digits.batches, 60):
        for k, (x, y) in enumerate(
            zip(np.split(batch["inputs"], 4), np.split(batch["targets"], 4), strict=True)
        ):
            seen[k] |= {image.tobytes() for image in np.asarray(x)}
            counts[k] += np.asarray(y).sum(axis=0)
    assert sum(map(len, seen)) > 1000
    everyone = set().union(*seen)
    assert len(everyone) == sum(map(len, seen))  # no image with two workers
    assert everyone.isdisjoint(image.tobytes() for image in digits.test_images)
    shares = counts / counts.sum(axis=1, keepdims=True)
    assert shares.max(axis=0).mean() > 2 * shares.mean()  # a digit belongs to some more than others


def test_without_scikit_learn_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit, match=r"pip install 'jdml\[experiments\]'"):
        read_digits(Config())


@pytest.mark.parametrize(
    ("change", "message"), [({"rounds": 0}, "--rounds must be"), ({"seeds": ()}, "--seeds is")]
)
def test_bad_options(change, message):
    with pytest.raises(ValueError, match=message):
        Config(**change)
