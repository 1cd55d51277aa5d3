"""Workers that do not run in lockstep: ``python -m benchmarks.pace [--json FILE] [row ...]``.

What the server costs, what a straggler costs the others, and what simulating costs. Each figure is
the median of several tries; the throughput of workers is measured on computation that sleeps, so
that it says what the waiting costs and not how many cores there are.

``benchmarks/pace_ray.py``, if it is there, brings more rows, in a dict ``ROWS`` like the one here.
"""

import argparse
import importlib
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from rich.table import Table

from benchmarks.machine import console_of_tables, machine
from jdml.communicate.pace import (
    Rule,
    Server,
    SgdWorker,
    ShardedServer,
    Task,
    VirtualClock,
    add,
    asynchronous,
    run_threads,
    simulate,
)
from jdml.communicate.pace.connection import Connection

NUM_BYTES = 50_000_000
NUM_LEAVES = 20
TRIES = 15
STEP_SECONDS = 0.01
STRAGGLER_SECONDS = 2.0
NUM_EVENTS = 100_000


class Figure(NamedTuple):
    """One row of the table.

    Attributes:
      name: What was measured.
      value: The median.
      unit: Its unit.
      target: What it should be, or ``None``.
      sense: Whether the target is the most or the least.
      note: How it came about.
    """

    name: str
    value: float
    unit: str
    target: float | None = None
    sense: Literal["at most", "at least"] = "at most"
    note: str = ""

    @property
    def missed(self) -> bool:
        if self.target is None:
            return False
        return self.value > self.target if self.sense == "at most" else self.value < self.target


def fifty_megabytes(seed: int = 0) -> dict[str, np.ndarray]:
    """A tree of f32 leaves of unequal sizes, as a model has them."""
    draws = np.random.default_rng(seed)
    shares = np.arange(1, NUM_LEAVES + 1) / sum(range(1, NUM_LEAVES + 1))
    sizes = [(max(1, int(NUM_BYTES / 4 / 256 * share)), 256) for share in shares]
    return {
        f"leaf{i}": draws.standard_normal(size, dtype=np.float32) for i, size in enumerate(sizes)
    }


def push_and_pull(server: Any, tries: int = TRIES) -> list[float]:
    """Seconds of a push and the pull after it, by one worker, where it reads every element."""
    updates = [fifty_megabytes(seed) for seed in (1, 2)]
    line = Connection(server, 0)
    version = line.pull().version
    seconds = []
    for i in range(tries + 2):
        update = updates[i % 2]
        began = time.perf_counter()
        line.push(*line.encode(update), version)
        snapshot = line.pull()
        seconds.append(time.perf_counter() - began)
        version = snapshot.version
    return seconds[2:]


def server_row() -> list[Figure]:
    params, rule = fifty_megabytes(), Rule(asynchronous(), add(0.25))
    megabytes = sum(x.nbytes for x in params.values()) / 1e6
    one = statistics.median(push_and_pull(Server(params, rule, 1)))
    four = statistics.median(push_and_pull(ShardedServer(params, rule, 1, 4)))
    leaves, update = list(params.values()), list(fifty_megabytes(1).values())
    in_place = []
    for _ in range(TRIES):
        began = time.perf_counter()
        for x, u in zip(leaves, update, strict=True):
            x += np.float32(0.25) * u
        in_place.append(time.perf_counter() - began)
    floor = statistics.median(in_place)
    return [
        Figure(
            "push and pull, one server",
            1e3 * one,
            "ms",
            60.0,
            note=f"{megabytes:.0f} MB in {NUM_LEAVES} leaves, "
            f"{one / floor:.2f} of NumPy's x += 0.25 u ({1e3 * floor:.0f} ms)",
        ),
        Figure("push and pull, four servers", 1e3 * four, "ms", note="shards joined for reading"),
    ]


class Still(Task):
    """Takes no time and goes nowhere."""

    def __init__(self, size: int = 1) -> None:
        self.update = {"w": np.zeros(size, np.float32)}

    def init(self, worker: int, params: Any) -> Any:
        return ()

    def step(self, worker: int, params: Any, state: Any, index: int, towards: Any = None) -> Any:
        return self.update, state, 0.0


def straggler_row() -> list[Figure]:
    """Three workers with a fourth that sleeps ten times as long, and the three alone."""

    def pushes_per_second(num_workers: int) -> float:
        server = Server({"w": np.zeros(1, np.float32)}, Rule(asynchronous(), add()), num_workers)
        workers = [SgdWorker(k, Still()) for k in range(num_workers)]
        times = np.array([[STEP_SECONDS] * 3 + [10 * STEP_SECONDS]])
        done = run_threads(
            server,
            workers,
            seconds=STRAGGLER_SECONDS,
            slow_down=times[:, :num_workers],
            rehearse=False,
        )
        return float(done.num_pushes[:3].sum() / done.wall_seconds)

    pairs = [(pushes_per_second(3), pushes_per_second(4)) for _ in range(3)]
    alone, together = (statistics.median(column) for column in zip(*pairs, strict=True))
    kept = statistics.median(b / a for a, b in pairs)
    return [
        Figure(
            "three fast workers beside a slow one",
            kept,
            "of alone",
            0.95,
            "at least",
            f"asynchronous, {1e3 * STEP_SECONDS:g} ms a step, the fourth 10 times that: "
            f"{together:.0f} of {alone:.0f} pushes/s",
        )
    ]


def virtual_row() -> list[Figure]:
    figures = []
    for num_workers in (32, 1000):
        rates = []
        for seed in range(3):
            rule = Rule(asynchronous(), add())
            params = {"w": np.zeros(1, np.float32)}
            server = Server(params, rule, num_workers, now=VirtualClock())
            workers = [SgdWorker(k, Still()) for k in range(num_workers)]
            # A trace, so that drawing times with JAX is not what is measured.
            times = np.random.default_rng(seed).lognormal(0.0, 0.5, (64, num_workers))
            began = time.perf_counter()
            done = simulate(server, workers, times, num_events=NUM_EVENTS)
            rates.append(done.num_events / (time.perf_counter() - began))
        figures.append(
            Figure(
                f"virtual time, {num_workers} workers",
                statistics.median(rates),
                "events/s",
                50_000.0,
                "at least",
                f"{NUM_EVENTS} events, no gradients",
            )
        )
    return figures


ROWS: dict[str, Callable[[], list[Figure]]] = {
    "server": server_row,
    "straggler": straggler_row,
    "virtual": virtual_row,
}
"""By name: what measures one or more rows."""


def rows() -> dict[str, Callable[[], list[Figure]]]:
    """Those of this file, and those that need Ray."""
    if importlib.util.find_spec("benchmarks.pace_ray") is None:
        return ROWS
    return ROWS | importlib.import_module("benchmarks.pace_ray").ROWS


def main() -> None:
    known = rows()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("rows", nargs="*", help=f"some of {', '.join(known)}; all by default")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    unknown = set(arguments.rows) - set(known)
    if unknown:
        raise SystemExit(f"{', '.join(sorted(unknown))}: not among {', '.join(known)}")
    figures = [figure for name in arguments.rows or known for figure in known[name]()]
    table = Table(title="Pace: medians", caption=machine("jax", "numpy", "ray", "torch"))
    for column in ("measured", "", "", "target", "how"):
        table.add_column(column, justify="right" if column == "" else "left")
    for f in figures:
        target = "" if f.target is None else f"{f.sense} {f.target:g}"
        value = f"{f.value:,.0f}" if f.value >= 100 else f"{f.value:.3g}"
        table.add_row(f.name, f"[red]{value}" if f.missed else value, f.unit, target, f.note)
    console_of_tables().print(table)
    if arguments.json is not None:
        about = machine("jax", "numpy", "ray", "torch")
        measured = [f._asdict() | {"missed": f.missed} for f in figures]
        text = json.dumps({"machine": about, "rows": measured}, indent=1)
        arguments.json.write_text(f"{text}\n")
    missed = [f.name for f in figures if f.missed]
    if missed:
        raise SystemExit(f"missed the target: {', '.join(missed)}")


if __name__ == "__main__":
    main()
