"""Who waits for whom: loss against time at eight paces.

python experiments/pace/run.py --help
"""

import contextlib
import functools
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).parents[2]))  # a clone's root, for `experiments` itself

from experiments.pace.config import Config
from experiments.pace.methods import Method, method
from experiments.pace.report import plot, table_of
from experiments.pace.task import Digits, digits
from experiments.pace.wall import in_processes, in_threads, session
from jdml.communicate.pace import (
    Arrivals,
    Server,
    SgdWorker,
    VirtualClock,
    heavy_tailed,
    log_normal,
    simulate,
)

Row = dict[str, Any]


def main(config: Config) -> None:
    """Every method under every model of delays; a table, a picture."""
    console = Console() if sys.stdout.isatty() else Console(width=140)
    console.print(
        f"digits, {config.num_workers} workers of {config.batch} images a step, learning rate "
        f"{config.learning_rate:g}; backend {config.backend}: times are {config.unit}"
    )
    seeds = config.seeds if config.backend == "virtual" else config.seeds[:1]
    variants = [(c, m, s) for c in config.clocks for m in config.methods for s in seeds]
    rows: list[Row] = []
    runs: list[Row] = []
    # Ray forks, which it must do before JAX has threads.
    with session(config) if config.backend == "ray" else contextlib.nullcontext():
        problems = {
            seed: digits(config.num_workers, config.batch, config.hidden, seed) for seed in seeds
        }
        for clock, name, seed in track(variants, "training", console=console, transient=True):
            of_run = {"backend": config.backend, "clock": clock, "method": name, "seed": seed}
            told, evaluations = train(config, problems[seed], clock, name, seed)
            runs.append(of_run | told)
            rows += (of_run | row for row in evaluations)
    write_report(config, rows, runs, console)


@functools.cache
def delays(config: Config, clock: str) -> Arrivals:
    """Of each step; a median worker's median is 1."""
    if clock == "one slow worker":
        return log_normal(config.sigma, slower={0: config.slowdown})
    return heavy_tailed(config.tail, 2 ** (-1 / config.tail))


def train(
    config: Config, problem: Digits, clock: str, name: str, seed: int
) -> tuple[Row, Iterator[Row]]:
    """What the run was like, and a row for each evaluation."""
    chosen = method(name, config.num_workers, config.learning_rate, config.compensation)
    model = delays(config, clock)
    if config.backend == "virtual":
        run, applied = in_virtual_time(config, problem, chosen, model, seed)
        waited, length = run.waiting_virtual_seconds, run.virtual_seconds
    else:
        if config.backend == "threads":
            run, applied = in_threads(config, problem, chosen, model, seed)
        else:
            run, applied = in_processes(config, problem, chosen, name, model, seed)
        waited, length = run.waiting_wall_seconds, run.wall_seconds
    column = config.unit.replace(" ", "_")
    told = {
        "updates": applied.total(),
        "refused": run.refused,
        "staleness": sum(k * n for k, n in applied.items()) / max(applied.total(), 1),
        "most_stale": max(applied, default=0),
        "waiting": float(np.mean(waited)) / length,
        column: length,
    }
    return told, ({column: e[0], "version": e.version, "loss": e.value} for e in run.evaluations)


def in_virtual_time(
    config: Config, problem: Digits, chosen: Method, model: Arrivals, seed: int
) -> tuple[Any, Counter[int]]:
    """The run, and how stale its updates were."""
    task = problem.make_task(chosen.tx)
    server = Server(problem.params, chosen.rule, config.num_workers, now=VirtualClock())
    run = simulate(
        server,
        [SgdWorker(k, task) for k in range(config.num_workers)],
        model,
        virtual_seconds=config.length,
        evaluate=problem.loss,
        evaluate_every_virtual_seconds=config.length / config.evaluations,
        seed=seed,
    )
    return run, server.staleness


def write_report(config: Config, rows: list[Row], runs: list[Row], console: Console) -> None:
    """``metrics.jsonl``, ``runs.jsonl``, ``summary.txt`` (printed too) and ``pace.png``."""
    out = config.out / config.backend
    out.mkdir(parents=True, exist_ok=True)
    for name, lines in (("metrics", rows), ("runs", runs)):
        with (out / f"{name}.jsonl").open("w") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    tables = [table_of(config, clock, rows, runs) for clock in config.clocks]
    with (out / "summary.txt").open("w") as file:
        for to in (Console(file=file, width=140), console):
            to.print(*tables)
    try:
        plot(config, rows, runs, out / "pace.png")
    except ImportError:
        console.print("No picture: pip install 'jdml[experiments]' brings matplotlib.")


if __name__ == "__main__":
    main(tyro.cli(Config))
