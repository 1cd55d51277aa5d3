"""The ADMM experiment as a user runs it, small; its problems and what counts as agreement."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.admm.config import Config, NetworkConfig
from experiments.admm.convex import lasso, logistic
from experiments.admm.run import METHODS, agrees_from

ROOT = Path(__file__).parents[2]
TINY = [
    *("--workers", "2", "--seeds", "0", "--rounds", "100", "--local-steps", "20"),
    *("--variants", "rho 1", "rho 10, adaptive"),
    *("--network.rounds", "2", "--network.local-steps", "3", "--network.batch", "8"),
    *("--network.model.widths", "4", "4", "--network.model.hidden", "8"),
]


@pytest.mark.slow
def test_a_small_run(tmp_path):
    result = subprocess.run(
        [
            sys.executable,
            str(ROOT / "experiments/admm/run.py"),
            "--out",
            str(tmp_path / "o"),
            *TINY,
        ],
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
    convex = [r for r in rows if "problem" in r]
    assert len(convex) == 2 * 2 * 100
    for problem, size in (("logistic regression", 31), ("lasso", 10)):
        mine = [r for r in convex if r["problem"] == problem]
        # The mean as f32, and three sums for the residuals: twice half of them, for two workers.
        assert mine[0]["bytes_sent"] == 4 * size + 4 * 3
        last = [r["gap"] for r in mine if r["round"] == 100]
        assert -1e-12 < min(last) < 1e-6
    trained = {r["method"]: r for r in rows if "method" in r and r["steps"] == 6}
    assert set(trained) == set(METHODS)
    assert [trained[m]["round"] for m in METHODS] == [2, 2, 6]
    assert trained["ADMM"]["admm_rho"] == pytest.approx(NetworkConfig().rho)
    assert "rho 10, adaptive" in (tmp_path / "o/summary.txt").read_text()
    for name in ("residuals.png", "network.png"):
        assert (tmp_path / "o" / name).stat().st_size > 10_000


@pytest.mark.parametrize(("make", "strength"), [(logistic, 1.0), (lasso, 0.05)])
def test_the_shares_are_the_whole_problem_and_its_answer_is_the_least(make, strength):
    """The losses of the workers, padded, sum to the smooth part of the objective over all data."""
    problem = make(8, strength, 0)
    rng = np.random.default_rng(0)
    values = []
    for scale in (0.0, 0.5):
        params = {k: scale * rng.normal(size=v.shape) for k, v in problem.start.items()}
        with jax.enable_x64(True):
            shares = {k: v.reshape(8, -1, *v.shape[1:]) for k, v in problem.batch.items()}
            parts = [
                float(problem.loss_fn(params, {k: v[i] for k, v in shares.items()}, None)[0])
                for i in range(8)
            ]
        w = params["w"]
        penalty = np.sum(w**2) / 2 if make is logistic else 8 * strength * np.sum(np.abs(w))
        values.append(problem.objective(params))
        np.testing.assert_allclose(sum(parts) + penalty, values[-1], rtol=1e-12)
    assert problem.best < min(values)


def test_agreement_counts_from_where_it_lasts():
    gaps = [1e-7, 1e-3, 5e-7, -2e-7]
    rows = [{"round": i, "gap": gap} for i, gap in enumerate(gaps, 1)]
    assert agrees_from(rows) == 3
    assert agrees_from(rows[:2]) is None
    assert agrees_from([{"round": 1, "gap": float("nan")}]) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": 0}, "--rounds must be"),
        ({"network": NetworkConfig(local_steps=0)}, "--network.local-steps must be"),
        ({"seeds": ()}, "--seeds is"),
        ({"variants": ("rho 2",)}, "--variants 'rho 2' is not one of"),
    ],
)
def test_bad_options(change, message):
    with pytest.raises(ValueError, match=message):
        Config(**change)
