"""What a mean costs over links of a known speed: ``python -m benchmarks.links``.

Four processes in network namespaces, each with 16 MB of f32, take their mean over 200 Mbit/s links:
exactly, by every codec, over every topology, and by PyTorch over Gloo on the same links
(``all_reduce``, and DistributedDataParallel with its communication hooks). The methods alternate
round by round, PyTorch's among them, so that a slow spell of the machine hits all. Bytes are those
that the kernel counted on each worker's interface, framing included; a round takes as long as its
slowest worker. Every process computes on one thread.

Needs root on Linux (network namespaces), and PyTorch for its rows; says so where they are missing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.crew import Crew, crew_of
from benchmarks.links_picture import draw
from benchmarks.machine import console_of_tables, machine
from benchmarks.methods import cost, method
from benchmarks.namespaces import LinkedWorker, NamespacesUnavailable, linked_workers
from jdml.communicate import Link

ROOT = Path(__file__).resolve().parent.parent
PORT = 29500  # inside a namespace of our own, so that it is always free
TORCH = "torch "
BASELINE = "torch all_reduce"
# Bytes of TCP payload in a full Ethernet frame, and of the frame: what the shaper counts.
SEGMENT, FRAME = 1448, 1514

OURS = (
    "exact",
    "bf16",
    "int8",
    "fp8",
    "int4",
    "e3m0",
    "qsgd",
    "terngrad",
    "one_bit",
    "one_bit + EF",
    "top 1 % + int8 all_gather",
    "power_sgd 4",
    "int8 ring",
    "int8 tree",
    "int8 hierarchical",
    "int8 all_gather",
)
THEIRS = (
    "torch all_reduce",
    "torch f32",
    "torch fp16",
    "torch bf16",
    "torch int8 per tensor",
    "torch int8 per 512",
    "torch PowerSGD 4",
)


@dataclass(frozen=True)
class Target:
    """What a method is to reach: bytes against one row's, time against another's."""

    name: str
    bytes_ratio: float
    time_ratio: float
    bytes_of: str = "exact"
    time_of: str = BASELINE


TARGETS = (
    Target("int8", 0.26, 0.32),
    Target("int4", 0.14, 0.20),
    Target("one_bit", 0.035, 0.10),
    Target("top 1 % + int8 all_gather", 0.03, 0.10),
    # Equal bytes: the two frame them in packets of their own.
    Target("power_sgd 4", 1.05, 1.0, bytes_of="torch PowerSGD 4", time_of="torch PowerSGD 4"),
)


@dataclass(frozen=True)
class Options:
    """Options of the benchmark."""

    num_workers: int = 4
    megabits_per_s: float | None = 200.0
    """What each worker's link carries; None leaves the links unshaped."""
    side: int = 1024
    """Each worker holds four side × side matrices of f32: 16.8 MB."""
    num_rounds: int = 9
    num_warm_up: int = 2
    methods: tuple[str, ...] = OURS + THEIRS
    """A codec, perhaps followed by a topology; "torch ..." is PyTorch."""
    torch: bool = True
    """Run PyTorch's methods too, if it is installed."""
    json: Path | None = None
    """Write what was measured there."""
    picture: Path | None = None
    """Draw bytes and times there (.png); needs matplotlib."""
    timeout_s: float = 300.0


@dataclass(frozen=True)
class Measured:
    """One method: bytes of the worker that sent most, and the median round, both per mean."""

    sent_bytes: float
    seconds: float
    relative_error: float
    predicted: float | None = None
    """Seconds by the cost model, from the link's latency and rate and the codec's speed."""
    rounds: tuple[float, ...] = ()
    """Seconds of each round."""


@contextlib.contextmanager
def crews(
    workers: Sequence[LinkedWorker],
    side: int,
    torch: bool,
    timeout_s: float,
    *,
    xla_flags: str = "",
) -> Iterator[tuple[Crew, Crew | None]]:
    """jdml's processes and, if wanted, PyTorch's, in the same namespaces."""
    env = dict(os.environ, PYTHONPATH=str(ROOT), PYTHONUNBUFFERED="1")
    env["XLA_FLAGS"] = xla_flags  # ours may ask for several devices per process
    # One computing thread per process, for XLA and for PyTorch: two cores, four workers.
    env |= {"NPROC": "1", "OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}

    def commands(module: str, port: int) -> list[list[str]]:
        shared = f"--num-workers {len(workers)} --side {side} --seed 0".split()
        where = f"{workers[0].address}:{port}"
        script = [sys.executable, "-m", module, "--coordinator", where, *shared]
        return [w.command(*script, "--worker", str(i)) for i, w in enumerate(workers)]

    with contextlib.ExitStack() as stack:
        ours = commands("benchmarks.exchange_jdml", PORT)
        jdml = stack.enter_context(crew_of(ours, env, timeout_s))
        theirs = None
        if torch:
            command = commands("benchmarks.exchange_torch", PORT + 1)
            theirs = stack.enter_context(crew_of(command, env, timeout_s))
        yield jdml, theirs


def run(options: Options, console: Console | None = None) -> dict[str, Measured]:
    """Starts the processes, lets the methods alternate, and gathers what they measured."""
    torch = any(name.startswith(TORCH) for name in options.methods)
    errors: dict[str, float] = {}
    predicted: dict[str, float] = {}
    rounds: dict[str, list[list[dict[str, float]]]] = {name: [] for name in options.methods}
    total = len(options.methods) * (1 + options.num_warm_up + options.num_rounds)
    with (
        linked_workers(options.num_workers, options.megabits_per_s) as workers,
        crews(workers, options.side, torch, options.timeout_s) as (jdml, theirs),
        Progress(console=console, transient=True, disable=console is None) as progress,
    ):

        def ask(name: str, do: str, **arguments: int) -> list[dict[str, float]]:
            crew, known_as = jdml, name
            if name.startswith(TORCH):
                assert theirs is not None
                crew, known_as = theirs, name.removeprefix(TORCH)
            progress.update(task, advance=1, description=f"{do} {name}")
            return crew.ask(do, name=known_as, **arguments)

        task = progress.add_task("starting", total=total)
        # The link as it is between these processes: what a hop takes, and what headers leave.
        latency = max(jdml.ask("latency", rounds=50))
        rate = (options.megabits_per_s or math.inf) * 1e6 / 8
        link = Link(latency, rate * SEGMENT / FRAME)
        for name in options.methods:
            errors[name] = max(answer["relative_error"] for answer in ask(name, "prepare"))
            speed = None
            if not name.startswith(TORCH):
                rates = jdml.ask("codec_rate", name=name, rounds=3)
                speed = None if rates[0] is None else min(rates)
            predicted[name] = predicted_seconds(name, options, link, speed)
        for number in range(options.num_warm_up + options.num_rounds):
            for name in options.methods:
                answers = ask(name, "round", number=number)
                if number >= options.num_warm_up:
                    rounds[name].append(answers)
    return {n: _summary(rounds[n], errors[n], predicted[n]) for n in options.methods}


def predicted_seconds(
    name: str, options: Options, link: Link, codec_rate: float | None = None
) -> float:
    """A round by the cost model; PyTorch's methods by the same formulas, without their codecs."""
    workers, side = options.num_workers, options.side
    if not name.startswith(TORCH):
        return cost(method(name), side, workers, link, codec_rate).seconds
    hook, exact = name.removeprefix(TORCH), method("exact")
    if hook.startswith("PowerSGD"):
        return cost(method("power_sgd 4"), side, workers, link).seconds
    if hook.startswith("int8"):  # an all-gather of one byte for every four
        whole = cost(method("exact all_gather"), side, workers, link)
        return whole.num_hops * link.latency + whole.sent_bytes / 4 / link.bandwidth
    ring = cost(exact, side, workers, link)
    share = 2 if hook in ("fp16", "bf16") else 1
    return ring.num_hops * link.latency + ring.sent_bytes / share / link.bandwidth


def _summary(rounds: list[list[dict[str, float]]], error: float, predicted: float) -> Measured:
    per_worker = zip(*rounds, strict=True)
    seconds = [max(a["end"] - a["start"] for a in answers) for answers in rounds]
    return Measured(
        sent_bytes=max(statistics.median(a["sent"] for a in answers) for answers in per_worker),
        seconds=statistics.median(seconds),
        relative_error=error,
        predicted=predicted,
        rounds=tuple(seconds),
    )


def runnable(options: Options) -> tuple[Options, list[str]]:
    """The options with the methods that this machine can run, and what was left out and why.

    Raises:
      ValueError: no such method.
    """
    kept, remarks = [], []
    torch = options.torch and importlib.util.find_spec("torch") is not None
    for name in options.methods:
        if name.startswith(TORCH):
            if torch:
                kept.append(name)
        elif method(name).pattern != "hierarchical" or options.num_workers % 2 == 0:
            kept.append(name)
    if options.torch and not torch:
        remarks.append("PyTorch is not installed here: its rows are left out (make bench-peers).")
    return dataclasses.replace(options, methods=tuple(kept)), remarks


def title(options: Options) -> str:
    """What is measured."""
    speed = f"{options.megabits_per_s:g} Mbit/s" if options.megabits_per_s else "unshaped"
    megabytes = 16 * options.side**2 / 1e6
    return f"Mean of {megabytes:.1f} MB f32 over {options.num_workers} processes, {speed} links"


def report(options: Options, measured: dict[str, Measured]) -> Table:
    """The table: ratios to the exact mean in bytes and to PyTorch's f32 all-reduce in time."""
    table = Table(title=title(options), caption=machine("jax", "torch"))
    table.add_column("method", no_wrap=True)
    headings = ("MB / worker", "/ exact", "s / round", "predicted", "/ torch f32", "rel. error")
    for heading in headings:
        table.add_column(heading, justify="right")

    def ratio(x: float, base: float | None) -> str:
        return "" if base is None else f"{x / base:.3f}"

    exact = measured["exact"].sent_bytes if "exact" in measured else None
    base = measured[BASELINE].seconds if BASELINE in measured else None
    for name, m in measured.items():
        table.add_row(
            name,
            f"{m.sent_bytes / 1e6:.2f}",
            ratio(m.sent_bytes, exact),
            f"{m.seconds:.3f}",
            "" if m.predicted is None else f"{m.predicted:.3f}",
            ratio(m.seconds, base),
            f"{m.relative_error:.1e}",
        )
    return table


def verdicts(measured: dict[str, Measured]) -> list[tuple[str, bool]]:
    """A line for each target whose rows were measured, and whether it was met."""
    lines = []
    for target in TARGETS:
        if not {target.name, target.bytes_of, target.time_of} <= measured.keys():
            continue
        m = measured[target.name]
        of_bytes = m.sent_bytes / measured[target.bytes_of].sent_bytes
        of_time = m.seconds / measured[target.time_of].seconds
        met = of_bytes <= target.bytes_ratio and of_time <= target.time_ratio
        lines.append(
            (
                f"{target.name}: bytes {of_bytes:.3f} of {target.bytes_of} "
                f"(target {target.bytes_ratio}), time {of_time:.3f} of {target.time_of} "
                f"(target {target.time_ratio}): {'met' if met else 'MISSED'}",
                met,
            )
        )
    return lines


def main(options: Options) -> int:
    """Prints the table; status 1 if a target is missed, 0 if met or not measurable here."""
    console = console_of_tables()
    options, remarks = runnable(options)
    for remark in remarks:
        console.print(remark, markup=False)
    try:
        measured = run(options, console)
    except NamespacesUnavailable as error:
        console.print(f"links benchmark skipped: {error}", markup=False)
        return 0
    console.print(report(options, measured))
    lines = verdicts(measured)
    for line, _ in lines:
        console.print(line, markup=False, highlight=False)
    if options.json is not None:
        content = {
            "machine": machine("jax", "torch"),
            "options": {
                name: value
                for name, value in dataclasses.asdict(options).items()
                if not isinstance(value, Path)
            },
            "measured": {name: dataclasses.asdict(m) for name, m in measured.items()},
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    if options.picture is not None:
        console.print(f"picture: {draw(measured, title(options), options.picture)}")
    return 0 if all(met for _, met in lines) else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
