"""A thousand workers in virtual time: throughput, staleness and loss, and the simulation's cost.

python experiments/scale/run.py --help
"""

import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).parents[2]))  # a clone's root, for `experiments` itself

from experiments.pace.methods import method
from experiments.pace.task import Digits, digits
from experiments.scale.config import Config
from experiments.scale.report import cost_table, plot, training_table
from jdml.communicate.cost import Link
from jdml.communicate.pace import (
    Arrivals,
    Network,
    Server,
    SgdWorker,
    Task,
    Towards,
    VirtualClock,
    VirtualRun,
    heavy_tailed,
    simulate,
)

Row = dict[str, Any]


class Nothing(Task):
    """Computes nothing, so that the simulation alone is measured."""

    def __init__(self, params: Any) -> None:
        self._update = jax.tree.map(np.zeros_like, params)

    def init(self, worker: int, params: Any) -> Any:
        return ()

    def step(
        self, worker: int, params: Any, state: Any, index: int, towards: Towards | None = None
    ) -> tuple[Any, Any, Any]:
        return self._update, state, 0.0


def main(config: Config) -> None:
    """Both halves; two tables, a picture."""
    console = Console() if sys.stdout.isatty() else Console(width=140)
    problem = digits(config.workers[-1], config.batch, config.hidden, config.seed)
    small = {"w": np.zeros(8, np.float32)}
    console.print(
        f"digits, {sum(x.size for x in problem.params.values()):,} parameters; workers take "
        "heavy-tailed times, whose median is one virtual second"
    )
    costs = [
        cost(config, params, count, name)
        for params in (small, problem.params)
        for count in config.workers
        for name in track(config.methods, "simulating", console=console, transient=True)
    ]
    runs: list[Row] = []
    rows: list[Row] = []
    for name in track(config.methods, "training", console=console, transient=True):
        told, evaluations = train(config, problem, name)
        runs.append(told)
        rows += ({"method": name, **row} for row in evaluations)
    write_report(config, costs, runs, rows, console)


@functools.cache
def times(tail: float) -> Arrivals:
    """Of a step; their median is 1."""
    return heavy_tailed(tail, 2 ** (-1 / tail))


def start(
    config: Config, params: Any, count: int, name: str, make_task: Any, **limits: Any
) -> tuple[VirtualRun, Server]:
    """A run."""
    chosen = method(name, count, config.learning_rate)
    server = Server(params, chosen.rule, count, now=VirtualClock())
    task = make_task(chosen.tx)
    run = simulate(
        server,
        [SgdWorker(k, task) for k in range(count)],
        times(config.tail),
        seed=config.seed,
        **limits,
    )
    return run, server


def cost(config: Config, params: Any, count: int, name: str) -> Row:
    """Events per second of this process, without gradients."""
    task = Nothing(params)
    start(config, params, count, name, lambda tx: task, num_events=1)  # compiles the clocks
    began = time.perf_counter(), time.process_time()
    run, _ = start(config, params, count, name, lambda tx: task, num_events=config.events)
    wall, process = time.perf_counter() - began[0], time.process_time() - began[1]
    return {
        "method": name,
        "workers": count,
        "parameters": sum(x.size for x in params.values()),
        "events": run.num_events,
        "wall_seconds": wall,
        "process_seconds": process,
    }


def train(config: Config, problem: Digits, name: str) -> tuple[Row, list[Row]]:
    """What the run was like and what it cost, and a row for each evaluation."""
    before, began = resident(), time.perf_counter()
    run, server = start(
        config,
        problem.params,
        config.workers[-1],
        name,
        problem.make_task,
        virtual_seconds=config.virtual_seconds,
        network=Network(Link(config.latency_virtual_seconds, float("inf"))),
        evaluate=problem.loss,
        evaluate_every_virtual_seconds=config.virtual_seconds / config.evaluations,
    )
    wall = time.perf_counter() - began
    applied = server.staleness
    told = {
        "method": name,
        "virtual_seconds": run.virtual_seconds,
        "updates": applied.total(),
        "refused": run.refused,
        "staleness": sum(k * n for k, n in applied.items()) / max(applied.total(), 1),
        "waiting": float(np.mean(run.waiting_virtual_seconds)) / run.virtual_seconds,
        "events": run.num_events,
        "wall_seconds": wall,
        "grown_bytes": resident() - before,
    }
    rows = [
        {"virtual_seconds": e.virtual_seconds, "version": e.version, "loss": e.value}
        for e in run.evaluations
    ]
    return told, rows


def resident() -> int:
    """Bytes of memory that this process holds."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def write_report(
    config: Config, costs: list[Row], runs: list[Row], rows: list[Row], console: Console
) -> None:
    """``metrics.jsonl``, ``summary.txt`` (printed too) and ``scale.png``."""
    config.out.mkdir(parents=True, exist_ok=True)
    for name, lines in (("costs", costs), ("runs", runs), ("metrics", rows)):
        with (config.out / f"{name}.jsonl").open("w") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    tables = [training_table(config, runs, rows), cost_table(config, costs)]
    with (config.out / "summary.txt").open("w") as file:
        for to in (Console(file=file, width=140), console):
            to.print(*tables)
    try:
        plot(config, costs, rows, config.out / "scale.png")
    except ImportError:
        console.print("No picture: pip install 'jdml[experiments]' brings matplotlib.")


if __name__ == "__main__":
    main(tyro.cli(Config))
