"""The scale experiment, small: its figures, its report, refused options."""

import json

import pytest
from rich.console import Console

from experiments.pace.task import digits
from experiments.scale import run
from experiments.scale.config import Config


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return Config(
        out=tmp_path_factory.mktemp("scale"),
        workers=(3, 20),
        methods=("BSP", "SSP s = 1", "asynchronous", "backup b = 2"),
        events=600,
        virtual_seconds=6.0,
        evaluations=3,
        hidden=8,
        target=2.2,
    )


@pytest.fixture(scope="module")
def problem(config):
    return digits(config.workers[-1], config.batch, config.hidden, 0)


@pytest.fixture(scope="module")
def costs(config, problem):
    return [
        run.cost(config, params, count, name)
        for params in ({"w": problem.params["out bias"]}, problem.params)
        for count in config.workers
        for name in config.methods
    ]


@pytest.fixture(scope="module")
def trained(config, problem):
    return {name: run.train(config, problem, name) for name in config.methods}


def test_the_simulation_costs_time(config, costs):
    assert len(costs) == 2 * 2 * len(config.methods)
    for row in costs:
        assert row["events"] >= config.events
        assert row["process_seconds"] > 0
        assert row["wall_seconds"] > 0


def test_throughput_staleness_and_loss(config, trained):
    told = {name: t for name, (t, _) in trained.items()}
    assert told["BSP"]["staleness"] == 0 < told["asynchronous"]["staleness"]
    assert told["BSP"]["updates"] < told["asynchronous"]["updates"]
    assert told["backup b = 2"]["refused"] > 0
    for _, rows in trained.values():
        assert rows[0]["virtual_seconds"] == 0
        assert rows[-1]["virtual_seconds"] == config.virtual_seconds
        assert rows[-1]["loss"] < rows[0]["loss"]


def test_its_report(config, costs, trained):
    runs = [told for told, _ in trained.values()]
    rows = [{"method": m, **r} for m, (_, of_m) in trained.items() for r in of_m]
    run.write_report(config, costs, runs, rows, Console(quiet=True))
    assert [json.loads(x) for x in (config.out / "costs.jsonl").read_text().splitlines()] == costs
    summary = (config.out / "summary.txt").read_text()
    assert "20 workers, 6 virtual seconds" in summary
    assert "of processor time" in summary
    assert (config.out / "scale.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ("SSP s = x",)}, "no method is called"),
        ({"workers": ()}, "--workers is empty"),
        ({"workers": (0,), "methods": ("BSP",)}, "expected at least 1"),
        ({"workers": (10, 100)}, "at most 9 can be spared"),
        ({"events": 0}, "--events must be greater than 0"),
    ],
)
def test_bad_options(change, message):
    with pytest.raises(ValueError, match=message):
        Config(**change)
