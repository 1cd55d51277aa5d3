"""The asynchronous ADMM experiment, small: it solves, its limit case, its report."""

import json

import jax
import numpy as np
import pytest
from rich.console import Console

from experiments.admm.convex import logistic
from experiments.async_admm import run
from experiments.async_admm.config import Config
from experiments.async_admm.report import agrees, to_target
from experiments.async_admm.task import Minimise
from jdml.communicate.pace import Towards


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return Config(
        out=tmp_path_factory.mktemp("async_admm"),
        workers=4,
        barriers=((4, 1), (2, 3)),
        clocks=("one slow worker",),
        seeds=(0,),
        virtual_seconds=120.0,
    )


@pytest.fixture(scope="module")
def solved(config):
    """The problem, its task, and the rows of every barrier."""
    with jax.enable_x64(True):
        problem = logistic(config.workers, config.ridge, 0)
        task = Minimise(problem, config.workers, config.solver_steps)
        rows = [
            {"clock": clock, "reports": s, "age": tau, "seed": 0} | row
            for clock in config.clocks
            for s, tau in config.barriers
            for row, _ in run.solve(config, problem, task, clock, s, tau, 0)
        ]
        yield problem, task, rows


@pytest.mark.slow
def test_a_local_minimum_is_one(solved):
    """The gradient of the part and the penalty vanishes there."""
    problem, task, _ = solved
    centre = jax.tree.map(lambda x: x + 0.3, problem.start)
    move, *_ = task.step(1, problem.start, (), 0, Towards(0.5, centre))
    x = jax.tree.map(np.add, problem.start, move)
    gradient = jax.grad(lambda p: problem.loss_fn(p, task.share(1), None)[0])(x)
    for name in x:
        np.testing.assert_allclose(gradient[name], -0.5 * (x[name] - centre[name]), atol=1e-4)


def test_waiting_for_all_is_synchronous_admm(config, solved):
    problem, task, _ = solved
    assert run.same(config, problem, task, 4) < 1e-12


def test_both_find_the_answer_and_the_late_one_is_not_waited_for(config, solved):
    *_, rows = solved
    sync, partial = (
        [r for r in rows if (r["reports"], r["age"]) == barrier] for barrier in config.barriers
    )
    for mine in (sync, partial):
        assert agrees(config, mine) is not None
        assert mine[-1]["primal"] < 1e-2 * mine[0]["primal"]
        assert [r["round"] for r in mine] == list(range(1, len(mine) + 1))
    assert len(partial) > 1.5 * len(sync)
    (seconds,) = to_target(config, rows, config.clocks[0], (4, 1), "virtual_seconds")
    assert seconds == agrees(config, sync)["virtual_seconds"]


def test_its_report(config, solved):
    *_, rows = solved
    run.write_report(config, rows, Console(quiet=True))
    lines = (config.out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows
    summary = (config.out / "summary.txt").read_text()
    assert "S = 4, τ = 1 (synchronous)" in summary
    assert "S = 2, τ = 3" in summary
    assert (config.out / "async_admm.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"barriers": ((17, 1),)}, "expected 1 <= S <= 16"),
        ({"barriers": ((4, 0),)}, "τ >= 1"),
        ({"clocks": ("slow",)}, "--clocks 'slow' is not one of"),
        ({"seeds": ()}, "--seeds is empty"),
    ],
)
def test_bad_options(change, message):
    with pytest.raises(ValueError, match=message):
        Config(**change)
