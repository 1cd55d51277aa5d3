"""The table of all aggregations, small: its rows, its bytes, its picture, refused options."""

import json

import pytest
from rich.console import Console

from experiments.aggregation import run
from experiments.aggregation.config import Config
from experiments.aggregation.methods import ENSEMBLES, METHODS
from experiments.digits import read_digits
from jdml.models import ConvNetConfig

NAMES = ("synchronous", "local SGD", "gossip, random pairs", *ENSEMBLES)


@pytest.mark.slow
def test_a_small_run_fills_its_table(tmp_path):
    config = Config(
        out=tmp_path,
        methods=NAMES,
        seeds=(0,),
        steps=48,
        batch=2,
        model=ConvNetConfig(widths=(4,), hidden=8),
    )
    images, labels = read_digits()
    trained = [n for n in NAMES if n == run.ALONE or not n.startswith("alone")]
    rows = [row for name in trained for row in run.train(config, name, images, labels)]
    by_name = {row["method"]: row for row in rows}
    assert set(by_name) == set(NAMES)
    size = 4 * config.model.num_params
    assert by_name["synchronous"]["rounds"] == 48
    assert by_name["synchronous"]["bytes_sent"] >= 48 * 2 * 7 / 8 * size
    assert by_name["local SGD"]["rounds"] == 6
    assert by_name["local SGD"]["bytes_sent"] < 0.2 * by_name["synchronous"]["bytes_sent"]
    pairs = by_name["gossip, random pairs"]
    assert 48 * size <= pairs["bytes_sent"] < 1.2 * 48 * size
    assert by_name["alone: ensemble"]["bytes_sent"] == 0
    assert by_name["alone: ensemble"]["accuracy"] > 0.2
    run.write_report(config, rows, Console(quiet=True))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == len(rows)
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["copies"] >= 2
    text = (tmp_path / "summary.txt").read_text()
    assert all(name in text for name in NAMES)
    assert (tmp_path / "aggregation.png").stat().st_size > 10_000


def test_every_lockstep_method_has_a_row():
    words = " ".join(METHODS).lower().replace("-", "").replace(" ", "")
    for name in (
        "dgc",
        "adasum",
        "bmuf",
        "choco",
        "pushsum",
        "gossip",
        "diloco",
        "eamsgd",
        "admm",
        "server",
    ):
        assert name in words


def test_refused_options():
    with pytest.raises(ValueError, match=r"--steps must be a multiple of 48"):
        Config(steps=50)
    with pytest.raises(ValueError, match=r"--methods 'SGD' is none of"):
        Config(methods=("SGD",))
    with pytest.raises(ValueError, match=r"--seeds is empty"):
        Config(seeds=())
