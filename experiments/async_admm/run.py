"""Asynchronous ADMM beside synchronous ADMM, where some workers are late.

python experiments/async_admm/run.py --help
"""

import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).parents[2]))  # a clone's root, for `experiments` itself

from experiments.admm.convex import Problem, logistic
from experiments.async_admm.config import Config
from experiments.async_admm.report import plot, table_of
from experiments.async_admm.task import Minimise
from jdml.communicate.pace import (
    AdmmWorker,
    Applied,
    Arrivals,
    Server,
    Towards,
    VirtualClock,
    async_admm,
    heavy_tailed,
    log_normal,
    simulate,
)

Row = dict[str, Any]


def main(config: Config) -> None:
    """Every barrier under every model of times; a table, a picture."""
    console = Console() if sys.stdout.isatty() else Console(width=140)
    rows: list[Row] = []
    with jax.enable_x64(True):
        problems = {seed: logistic(config.workers, config.ridge, seed) for seed in config.seeds}
        tasks = {s: Minimise(p, config.workers, config.solver_steps) for s, p in problems.items()}
        first = config.seeds[0]
        console.print(
            f"{problems[first].name}, {config.workers} workers; time is simulated, its unit the "
            f"median minimisation.\nS = N, τ = 1 beside synchronous ADMM in a loop: greatest "
            f"difference of z in 20 rounds {same(config, problems[first], tasks[first]):.0e}"
        )
        variants = [(c, b, s) for c in config.clocks for b in config.barriers for s in config.seeds]
        for clock, (reports, age), seed in track(
            variants, "solving", console=console, transient=True
        ):
            of_run = {"clock": clock, "reports": reports, "age": age, "seed": seed}
            solved = solve(config, problems[seed], tasks[seed], clock, reports, age, seed)
            rows += (of_run | row for row, _ in solved)
    write_report(config, rows, console)


@functools.cache
def times(config: Config, clock: str) -> Arrivals:
    """Of each minimisation; a median worker's median is 1."""
    if clock == "heavy tails":
        return heavy_tailed(config.tail, 2 ** (-1 / config.tail))
    slower = {0: config.slowdown} if clock == "one slow worker" else {}
    return log_normal(config.sigma, slower=slower)


def solve(
    config: Config,
    problem: Problem,
    task: Minimise,
    clock: str,
    reports: int,
    age: int,
    seed: int,
    **limits: float,
) -> list[tuple[Row, Any]]:
    """A row and z for each round: when it ended, and how far z is from the central solver's."""
    workers = [AdmmWorker(k, task, every=1, rho=config.rho) for k in range(config.workers)]
    rounds: list[tuple[Row, Any]] = []
    now = VirtualClock()

    def look(applied: Applied) -> None:
        if applied.version == len(rounds):
            return  # another report of the same round
        z, before = server.params, rounds[-1][1] if rounds else problem.start
        apart = sum(squares(w.params, z) for w in workers if w.params is not None)
        row = {
            "round": applied.version,
            "virtual_seconds": float(now.virtual_seconds),
            "gap": problem.objective(z) / problem.best - 1,
            "primal": apart**0.5,
            "dual": config.rho * (config.workers * squares(z, before)) ** 0.5,
        }
        rounds.append((row, z))

    rule = async_admm(reports, age, config.rho, problem.prox)
    server = Server(problem.start, rule, config.workers, now=now, on_applied=look)
    limits = limits or {"virtual_seconds": config.virtual_seconds}
    simulate(server, workers, times(config, clock), seed=seed, **limits)
    return rounds


def squares(x: Any, y: Any) -> float:
    """``|x - y|^2`` over all leaves."""
    return sum(float(np.sum((x[k] - y[k]) ** 2)) for k in y)


def same(config: Config, problem: Problem, task: Minimise, num_rounds: int = 20) -> float:
    """Greatest difference of z between S = N, τ = 1 and synchronous ADMM."""
    n = config.workers
    rounds = solve(config, problem, task, config.clocks[0], n, 1, 0, num_versions=num_rounds)
    reference = in_step(config, problem, task, num_rounds)
    return max(
        float(np.max(np.abs(z[k] - expected[k])))
        for (_, z), expected in zip(rounds, reference, strict=True)
        for k in z
    )


def in_step(config: Config, problem: Problem, task: Minimise, num_rounds: int) -> Iterator[Any]:
    """z of each round of Boyd et al. 2011, section 7.1, as it stands there: no server, no clock."""
    z: Any = problem.start
    xs = [z] * config.workers
    us = [jax.tree.map(np.zeros_like, z)] * config.workers
    for _ in range(num_rounds):
        for k, (x, u) in enumerate(zip(xs, us, strict=True)):
            centre = jax.tree.map(np.subtract, z, u)
            move, *_ = task.step(k, x, (), 0, Towards(config.rho, centre))
            xs[k] = jax.tree.map(np.add, x, move)
        mean = jax.tree.map(
            lambda *v: sum(v) / config.workers,
            *[jax.tree.map(np.add, x, u) for x, u in zip(xs, us, strict=True)],
        )
        z = jax.tree.map(np.asarray, problem.prox(mean, 1 / (config.workers * config.rho)))
        us = [jax.tree.map(lambda u, x, z: u + x - z, u, x, z) for u, x in zip(us, xs, strict=True)]
        yield z


def write_report(config: Config, rows: list[Row], console: Console) -> None:
    """``metrics.jsonl``, ``summary.txt`` (printed too) and ``async_admm.png``."""
    config.out.mkdir(parents=True, exist_ok=True)
    with (config.out / "metrics.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    tables = [table_of(config, clock, rows) for clock in config.clocks]
    with (config.out / "summary.txt").open("w") as file:
        for to in (Console(file=file, width=140), console):
            to.print(*tables)
    try:
        plot(config, rows, config.out / "async_admm.png")
    except ImportError:
        console.print("No picture: pip install 'jdml[experiments]' brings matplotlib.")


if __name__ == "__main__":
    main(tyro.cli(Config))
