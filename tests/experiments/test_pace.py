"""The pace experiment, small: its methods, its clocks, its report, refused options."""

import json

import jax
import numpy as np
import pytest
from rich.console import Console

from experiments.curves import reached
from experiments.pace import run
from experiments.pace.config import METHODS, Config
from experiments.pace.methods import method
from experiments.pace.task import digits


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return Config(
        out=tmp_path_factory.mktemp("pace"),
        workers=4,
        seeds=(0,),
        seconds=12,
        evaluations=6,
        target=2.0,
        hidden=8,
        clocks=("one slow worker",),
    )


@pytest.fixture(scope="module")
def problem(config):
    return digits(config.num_workers, config.batch, config.hidden, 0)


@pytest.fixture(scope="module")
def trained(config, problem):
    """By method, what its run was like and its evaluations."""
    found = {}
    for name in METHODS:
        told, rows = run.train(config, problem, config.clocks[0], name, 0)
        found[name] = told, list(rows)
    return found


def test_who_waits_and_who_does_not(trained):
    told = {name: t for name, (t, _) in trained.items()}
    # In step with a worker that takes four times as long, the other three wait.
    assert told["BSP"]["waiting"] > 0.5
    assert told["BSP"]["most_stale"] == 0
    assert told["SSP s = 1"]["most_stale"] <= 2
    assert told["asynchronous"]["waiting"] == told["DC-ASGD"]["waiting"] == 0
    assert told["backup b = 1"]["refused"] > 0
    order = ("BSP", "SSP s = 1", "SSP s = 4", "asynchronous")
    updates = [told[name]["updates"] for name in order]
    assert updates == sorted(updates)
    assert updates[0] < updates[-1]


def test_everybody_learns_from_one_start(trained):
    firsts = {rows[0]["loss"] for _, rows in trained.values()}
    assert len(firsts) == 1
    for _, rows in trained.values():
        assert [r["virtual_seconds"] for r in rows[:-1]] == [0, 2, 4, 6, 8, 10, 12]
        assert rows[-1]["loss"] < rows[0]["loss"]


def test_the_report(config, trained):
    of_run = {"backend": "virtual", "clock": "one slow worker", "seed": 0}
    runs = [of_run | {"method": m} | told for m, (told, _) in trained.items()]
    rows = [of_run | {"method": m} | r for m, (_, of_m) in trained.items() for r in of_m]
    run.write_report(config, rows, runs, Console(quiet=True))
    out = config.out / "virtual"
    assert [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()] == rows
    summary = (out / "summary.txt").read_text()
    assert "virtual seconds to a training loss of 2" in summary
    assert "wall" not in summary
    assert all(name in summary for name in METHODS)
    assert (out / "pace.png").stat().st_size > 10_000


def test_clocks_have_the_same_median(config):
    for clock in ("one slow worker", "heavy tails"):
        times = np.asarray(run.delays(config, clock)(jax.random.key(0), 0, 100_000))
        np.testing.assert_allclose(np.median(times), 1.0, rtol=0.01)


def test_the_target_is_met_between_two_evaluations():
    rows = [{"step": s, "loss": x} for s, x in ((0, 2.0), (5, 1.0), (10, 0.5))]
    assert reached(rows, 0.75, "step") == 7.5
    assert reached(rows, 3.0, "step") == 0.0
    assert np.isnan(reached(rows, 0.1, "step"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ("SSP",)}, "no method is called 'SSP'"),
        ({"methods": ("backup b = -1",)}, "no method is called"),
        ({"clocks": ("slow",)}, "--clocks 'slow' is not one of"),
        ({"seeds": ()}, "--seeds is empty"),
        ({"workers": 2}, "--workers must be at least 3"),
        ({"target": 0}, "--target must be greater than 0"),
    ],
)
def test_bad_options(change, message):
    with pytest.raises(ValueError, match=message):
        Config(**change)


def test_any_bound_has_a_name():
    assert method("SSP s = 7", 4, 0.1).rule.pace.staleness == 7
    assert method("backup b = 3", 4, 0.1).rule.pace.num_backups == 3
