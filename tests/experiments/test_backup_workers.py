"""The backup workers experiment, small: its clocks, its table, its picture, refused options."""

import json

import jax
import numpy as np
import pytest
from rich.console import Console

from experiments.backup_workers import run
from experiments.backup_workers.config import Config
from experiments.digits import read_digits
from jdml.models import ConvNetConfig


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return Config(
        out=tmp_path_factory.mktemp("backup_workers"),
        workers=8,
        backups=(0, 2),
        seeds=(0,),
        steps=6,
        eval_every=2,
        target=2.3,
        model=ConvNetConfig(widths=(4,), hidden=8),
    )


@pytest.fixture(scope="module")
def rows(config):
    images, labels = read_digits()
    return [
        {"arrivals": "log-normal", "backups": b, "seed": 0, **row}
        for b in config.backups
        for row in run.Trainer(config, run.arrivals(config)["log-normal"], b).train(
            images, labels, 0
        )
    ]


@pytest.mark.slow
def test_steps_without_the_latest_are_shorter(config, rows):
    all_of_them, without = (run.run_of(rows, "log-normal", b, 0) for b in (0, 2))
    assert [row["step"] for row in all_of_them] == [row["step"] for row in without] == [0, 2, 4, 6]
    # Both draw the same arrivals, of which one waits for the eighth and one for the sixth.
    for a, b in zip(all_of_them[1:], without[1:], strict=True):
        assert 0 < b["time"] < a["time"]
    assert all_of_them[0]["loss"] == without[0]["loss"]
    assert all_of_them[-1]["loss"] != without[-1]["loss"]


def test_its_report(config, rows):
    heavy = [{**row, "arrivals": "heavy-tailed", "time": 2 * row["time"]} for row in rows]
    run.write_report(config, rows + heavy, Console(quiet=True))
    lines = (config.out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows + heavy
    summary = (config.out / "summary.txt").read_text()
    assert "log-normal arrivals: simulated time to a test loss of 2.3" in summary
    assert "heavy-tailed arrivals" in summary
    assert (config.out / "backup_workers.png").stat().st_size > 10_000


def test_clocks_have_the_same_median(config):
    for clock in run.arrivals(config).values():
        times = np.asarray(clock(jax.random.key(0), 0, 100_000))
        np.testing.assert_allclose(np.median(times), 1.0, rtol=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backups": (0, 16)}, "0 to 15 can be spared"),
        ({"backups": ()}, "--backups is empty"),
        ({"eval_every": 0}, "--eval-every must be at least 1"),
    ],
)
def test_bad_options(change, message):
    with pytest.raises(ValueError, match=message):
        Config(**change)
