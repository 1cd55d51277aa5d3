"""The table of linear models, small: its rows, its bytes, its picture, refused options."""

import json

import jax
import pytest
from rich.console import Console

from experiments.linear import run
from experiments.linear.config import Config
from experiments.linear.data import DATA
from experiments.linear.measure import Bench
from experiments.linear.methods import METHODS
from experiments.linear.wire import Wire
from jdml.models.linear import LinearProblem, l2, logistic
from jdml.optimize import newton_cholesky, solve
from jdml.optimize.base import known_methods
from jdml.partition import choose_partition


def few(data):
    """80 samples."""
    x, y = DATA[data].load()
    return x[:80], y[:80]


@pytest.fixture(scope="module")
def bench():
    """Two workers' worth of digits, far from the end."""
    with jax.enable_x64(True):
        x, y = few("digits")
        problem = LinearProblem(x, y, logistic(), l2(0.1))
        least = solve(problem, newton_cholesky(), 1e-12, 50, progress=False).value
        yield Bench(problem, x, least, accuracy=1e-3, max_rounds=40)


@pytest.mark.parametrize(
    ("method", "grid", "vectors", "scalars"),
    [
        # A pass: gradient's 64 parameters, or 80 margins.
        pytest.param("gradient descent", (2, 1), 64, 16, marks=pytest.mark.slow),
        ("gradient descent", (1, 2), 80, 16),
        # Parameters are gathered twice, 32 from each; its pairs' products are sums, too.
        pytest.param("L-BFGS", (1, 2), 80, 128, marks=pytest.mark.slow),
        pytest.param("GIANT", (2, 1), 2 * 64, 16, marks=pytest.mark.slow),
        ("feature CoCoA", (1, 2), 80, 16),
    ],
)
def test_bytes_of_a_round(bench, method, grid, vectors, scalars):
    with jax.enable_x64(True):
        found = bench.measure(grid, method)
    assert 0 < found.rounds <= 40
    assert found.gaps[-1] < found.gaps[0]
    # Between two workers an all-reduce sends each number once; scalars come on top.
    assert found.sent[0] == 0
    assert 8 * vectors <= found.sent[1] <= 8 * (vectors + scalars)


@pytest.mark.slow
def test_products_in_loops_are_counted(bench):
    with jax.enable_x64(True):
        by_sample, by_feature = (bench.measure(grid, "Newton-CG") for grid in ((2, 1), (1, 2)))
        path = bench._paths["Newton-CG"]
    assert by_sample.rounds == by_feature.rounds
    for k, counts in enumerate(path.counts()):
        # One product there and back for each of conjugate gradients'; a direction's margins and a
        # gradient beside them.
        assert counts["margins"] == counts["parameters"] > 1
        for found, size in ((by_sample, 64), (by_feature, 80)):
            sent = found.sent[k + 1] - found.sent[k]
            assert 8 * size * counts["margins"] <= sent <= 8 * (size + 16) * counts["margins"]


def test_scalars_run_as_often_as_anything_does():
    wire = Wire(100, (1, 2), (10.0, 20.0, 1.0))
    assert wire.wants_counting
    assert wire.sent({"margins": 4, "parameters": 2, "objectives": 1}) == 100 + 3 * 10 + 3 * 1
    assert not Wire(100, (1, 2), (0, 0, 0)).wants_counting


@pytest.mark.slow
def test_a_small_run_fills_its_table(tmp_path, monkeypatch):
    methods = ("L-BFGS", "consensus ADMM", "feature CoCoA", "SAGA")
    small = DATA["digits"]._replace(load=lambda: few("digits"))
    monkeypatch.setattr(run, "DATA", {"digits": small})
    config = Config(
        out=tmp_path, data=("digits",), methods=methods, workers=4, accuracy=1e-2, max_rounds=500
    )
    quiet = Console(quiet=True)
    run.write_report(config, *run.fill(config, quiet), quiet)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    ways = {row["method"]: set() for row in rows}
    for row in rows:
        ways[row["method"]].add(row["by"])
        assert row["rounds"] > 0
        assert row["bytes"] > 0
    assert all(row["converged"] for row in rows if row["method"] == "L-BFGS")
    assert ways == {
        "L-BFGS": {"sample", "feature", "both"},
        "consensus ADMM": {"sample"},
        "feature CoCoA": {"feature"},
    }
    refused = (tmp_path / "refused.txt").read_text()
    assert refused.count("saga cannot do") == 3
    text = (tmp_path / "summary.txt").read_text()
    assert all(name in text for name in methods[:3])
    assert "it chose by" in text
    assert (tmp_path / "linear.png").stat().st_size > 10_000


def test_every_method_is_in_the_table():
    named = {method.name for method in METHODS.values()}
    # Those of constrained problems are for others than this.
    assert {cls.name for cls in known_methods()} - named == {"frank_wolfe", "projected"}


def test_the_report_of_nothing(tmp_path):
    config = Config(out=tmp_path, data=("digits",), methods=("SAGA",))
    choice = choose_partition(1797, 64, 1797 * 64, 8)
    run.write_report(config, [], {"digits": choice}, ["all of it"], Console(quiet=True))
    assert "all of it" in (tmp_path / "refused.txt").read_text()


def test_refused_options():
    with pytest.raises(ValueError, match=r"--methods 'newton' is none of"):
        Config(methods=("newton",))
    with pytest.raises(ValueError, match=r"--data is empty"):
        Config(data=())
    with pytest.raises(ValueError, match=r"--workers must be at least 2"):
        Config(workers=1)
    with pytest.raises(ValueError, match=r"--accuracy must be above 0"):
        Config(accuracy=0.0)
    with pytest.raises(ValueError, match=r"--max-rounds must be at least 1"):
        Config(max_rounds=0)
