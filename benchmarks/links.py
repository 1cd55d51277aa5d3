"""Compressed against exact mean over links of a known speed: ``python -m benchmarks.links``.

Four processes, each with 16 MB of f32 gradients, take their mean over 200 Mbit/s links, exactly and
by two-phase int8. Bytes are those that the kernel counted on each worker's interface, framing
included; a round takes as long as its slowest worker. The exact sum is Gloo's ring, which sends
2·(n-1)/n of the array; two-phase int8 sends the same share of one byte per element and one f32
scale per block.

Needs root on Linux (network namespaces); says so elsewhere.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.links_worker import Job
from benchmarks.namespaces import NamespacesUnavailable, linked_workers, run_together

ROOT = Path(__file__).resolve().parent.parent
BYTES_TARGET = 0.26
TIME_TARGET = 0.45
PORT = 29500  # inside a namespace of our own, so that it is always free


@dataclass(frozen=True)
class Options:
    """Options of the benchmark."""

    num_workers: int = 4
    megabits_per_s: float | None = 200.0
    """What each worker's link carries; None leaves the links unshaped."""
    num_elements: int = 4 * 1024 * 1024
    """f32 elements per worker."""
    num_rounds: int = 9
    num_warm_up: int = 2
    blocks: tuple[int, ...] = (256, 1024)
    """Block sizes of the int8 codec to compare with the exact mean."""
    timeout_s: float = 300.0


@dataclass(frozen=True)
class Measured:
    """One method: bytes of the worker that sent most, and the median round, both per mean."""

    sent_bytes: float
    seconds: float
    relative_error: float


def exact_bytes(num_elements: int, num_workers: int) -> float:
    """What a ring all-reduce of f32 sends per worker, framing excluded: 2·(n-1)/n·4·elements."""
    return 2 * (num_workers - 1) / num_workers * 4 * num_elements


def int8_bytes(num_elements: int, num_workers: int, block: int) -> float:
    """What two-phase int8 sends per worker: 2·(n-1)/n·(1 + 4/block)·elements."""
    return 2 * (num_workers - 1) / num_workers * (1 + 4 / block) * num_elements


def run(options: Options) -> dict[str, Measured]:
    """Starts one process per namespace and gathers what they measured, by method."""
    env = dict(os.environ, PYTHONPATH=str(ROOT), PYTHONUNBUFFERED="1")
    env.pop("XLA_FLAGS", None)  # may ask for several devices per process
    with linked_workers(options.num_workers, options.megabits_per_s) as workers:
        commands = []
        for i, worker in enumerate(workers):
            job = Job(
                coordinator=f"{workers[0].address}:{PORT}",
                num_workers=options.num_workers,
                worker=i,
                num_elements=options.num_elements,
                num_rounds=options.num_rounds,
                num_warm_up=options.num_warm_up,
                blocks=list(options.blocks),
            )
            script = [sys.executable, "-m", "benchmarks.links_worker", *_arguments(job)]
            commands.append(worker.command(*script))
        printed = run_together(commands, options.timeout_s, env)
    results = [json.loads(text.strip().splitlines()[-1]) for text in printed]
    return {method: _summary([result[method] for result in results]) for method in results[0]}


def _summary(per_worker: list[dict]) -> Measured:
    rounds = zip(*(entry["seconds"] for entry in per_worker), strict=True)
    return Measured(
        sent_bytes=max(statistics.median(entry["sent_bytes"]) for entry in per_worker),
        seconds=statistics.median(max(seconds) for seconds in rounds),
        relative_error=max(entry["relative_error"] for entry in per_worker),
    )


def _arguments(job: Job) -> list[str]:
    arguments = []
    for name, value in dataclasses.asdict(job).items():
        if isinstance(value, list):
            if value:
                arguments += [f"--{name.replace('_', '-')}", *map(str, value)]
        else:
            arguments += [f"--{name.replace('_', '-')}", str(value)]
    return arguments


def _machine() -> str:
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    today = datetime.date.today().isoformat()
    versions = f"Python {platform.python_version()}, jax {jax.__version__}"
    return f"{model}, {os.cpu_count()} cores, {versions}, {today}"


def report(options: Options, measured: dict[str, Measured]) -> tuple[Table, bool]:
    """The table, and whether some compressed method met both targets."""
    speed = f"{options.megabits_per_s:g} Mbit/s" if options.megabits_per_s else "unshaped"
    megabytes = options.num_elements * 4 / 1e6
    table = Table(
        title=f"Mean of {megabytes:.1f} MB f32 over {options.num_workers} processes, {speed} links",
        caption=_machine(),
    )
    table.add_column("method", no_wrap=True)
    for heading in ("MB / worker", "ratio", "s / round", "ratio", "rel. error"):
        table.add_column(heading, justify="right")
    exact, met = measured["exact"], False
    for name, m in measured.items():
        bytes_ratio, time_ratio = m.sent_bytes / exact.sent_bytes, m.seconds / exact.seconds
        met |= bytes_ratio <= BYTES_TARGET and time_ratio <= TIME_TARGET
        table.add_row(
            name,
            f"{m.sent_bytes / 1e6:.2f}",
            f"{bytes_ratio:.3f}",
            f"{m.seconds:.3f}",
            f"{time_ratio:.3f}",
            f"{m.relative_error:.1e}",
        )
    return table, met


def main(options: Options) -> int:
    """Prints the table; status 1 if the targets are missed, 0 if met or not measurable here."""
    console = Console()
    try:
        measured = run(options)
    except NamespacesUnavailable as error:
        console.print(f"links benchmark skipped: {error}", markup=False)
        return 0
    table, met = report(options, measured)
    console.print(table)
    targets = f"bytes at most {BYTES_TARGET}, time at most {TIME_TARGET} of the exact mean's"
    if options.blocks:
        console.print(f"targets ({targets}): {'met' if met else 'MISSED'}")
    return 0 if met or not options.blocks else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
