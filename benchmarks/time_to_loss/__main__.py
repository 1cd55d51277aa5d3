"""Time to a fixed validation loss over slow links: ``python -m benchmarks.time_to_loss``.

The main job's transformer at 3.1 million parameters, four worker processes in network namespaces,
trained by jdml and by PyTorch's DistributedDataParallel from the same weights on the same tokens in
the same order, with the same clipping, AdamW and schedule; before anything is timed, the two
programs' first loss and gradient are compared.

What a step loses does not depend on the link, so each method trains once to the end over unshaped
links, with validations; then the first steps of the same run are repeated over links of each rate
and timed, and their losses must equal the whole run's bit for bit. Time to the loss is steps to the
loss times the median step (1-bit Adam: of its exact steps and of those after). ``--full`` trains
to the end at every rate instead.

A step's computation is timed as the same step without its exchange (jdml: the chain without
``mean_gradients``; DDP: ``no_sync``), the four workers side by side; the exchange is what the whole
step takes longer, so encoding counts as exchange and what overlaps does not. Every process computes
on one thread (``NPROC=1`` for XLA, ``torch.set_num_threads(1)``), four of them on the machine's
cores.

What was measured is kept in ``--out``, a file per method, and not measured again: another
``--target`` takes seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.crew import crew_of
from benchmarks.machine import console_of_tables, machine
from benchmarks.methods import method
from benchmarks.namespaces import NamespacesUnavailable, linked_workers, shape
from benchmarks.time_to_loss.measure import Plan, Run, crew_commands
from benchmarks.time_to_loss.problem import ONE_BIT_ADAM, Task, write_problem
from benchmarks.time_to_loss.results import DDP, EXACT, TORCH, Result, load, verdicts

ROOT = Path(__file__).resolve().parents[2]

OURS = (
    EXACT,
    "int8",
    "int4",
    "int4 + EF",
    "one_bit + EF",
    "top 1 % + int8 + EF all_gather",
    "power_sgd 4",
    ONE_BIT_ADAM,
)
THEIRS = (DDP, "torch fp16", "torch bf16", "torch PowerSGD 4")
GRADIENTS_AGREE = 1e-5  # relative to the largest leaf's norm; f32 sums in another order


@dataclass(frozen=True)
class Options:
    """Options of the benchmark."""

    task: Task = field(default_factory=Task)
    rates: tuple[float, ...] = (50.0, 200.0, 1000.0)
    """Mbit/s that a worker's link carries."""
    methods: tuple[str, ...] = OURS + THEIRS
    target: float = 1.7
    """Validation loss to reach, nats per byte."""
    timed_steps: int = 10
    """Steps timed at each rate, after three that are not."""
    full: bool = False
    """Train to the end at every rate."""
    torch: bool = True
    """Train with PyTorch too, if it is installed."""
    out: Path = Path("runs/time_to_loss")
    """Folder for what is measured, and the picture."""
    timeout_s: float = 600.0


def run(options: Options, console: Console) -> dict[str, Result]:
    """Measures what ``options.out`` does not hold yet."""
    out, fingerprint = options.out, options.task.fingerprint()
    plan = Plan(options.task, options.rates, options.timed_steps, options.full, out)
    for name in options.methods:
        plan.check(name)
    results = {name: load(out, name, fingerprint) for name in options.methods}
    problem = out / f"problem-{fingerprint}.npz"
    if not problem.exists():
        console.print("drawing weights, cutting text ...")
        write_problem(options.task, problem)
    env = dict(os.environ, PYTHONPATH=str(ROOT), PYTHONUNBUFFERED="1")
    env.pop("XLA_FLAGS", None)  # may ask for several devices per process
    env |= {"NPROC": "1", "OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}
    with linked_workers(options.task.num_workers) as workers:
        for theirs in (False, True):
            mine = [r for r in results.values() if r.name.startswith(TORCH) == theirs]
            open_ones = [r for r in mine if not plan.is_complete(r)]
            gradient = out / f"gradient-{fingerprint}-{'torch' if theirs else 'jdml'}.npz"
            if not open_ones and (gradient.exists() or not mine):
                continue
            commands = crew_commands(workers, options.task, problem, theirs)
            per_rate = options.task.steps if options.full else 1
            total = len(open_ones) * (options.task.steps + per_rate * len(options.rates))
            with (
                crew_of(commands, env, options.timeout_s) as crew,
                Progress(console=console, transient=True) as progress,
            ):
                bar = progress.add_task("starting", total=total)
                asked = Run(plan, workers, crew)

                def tell(what: str, steps: int, progress=progress, bar=bar) -> None:
                    progress.update(bar, advance=steps, **({"description": what} if what else {}))

                shape(workers, None)
                loss = asked.gradient(gradient)
                console.print(f"{'PyTorch' if theirs else 'jdml'}: loss at step 0 is {loss:.6f}")
                if theirs:
                    compare_gradients(out, fingerprint, console)
                for result in open_ones:
                    asked.train(result, tell)
                    console.print(f"{result.name}: final validation loss {result.final_loss:.4f}")
                # All timings one after another: what else the machine does changes with the hour.
                console.print("timing ...")
                for result in open_ones:
                    asked.time(result, tell)
    return results


def compare_gradients(out: Path, fingerprint: str, console: Console) -> None:
    """The two programs' first gradients, leaf by leaf.

    Raises:
      RuntimeError: they are not those of one model on one batch.
    """
    ours, theirs = (out / f"gradient-{fingerprint}-{name}.npz" for name in ("jdml", "torch"))
    if not ours.exists():
        return
    with np.load(ours) as mine, np.load(theirs) as other:
        if set(mine.files) != set(other.files):
            raise RuntimeError(f"leaves differ: {sorted(mine.files)} and {sorted(other.files)}")
        largest = max(float(np.linalg.norm(mine[name])) for name in mine.files)
        apart = {n: float(np.linalg.norm(mine[n] - other[n])) / largest for n in mine.files}
    worst = max(apart, key=apart.__getitem__)
    if apart[worst] > GRADIENTS_AGREE:
        raise RuntimeError(
            f"jdml's and PyTorch's first gradients differ by {apart[worst]:.1e} of the largest "
            f"leaf's norm at {worst} (more than {GRADIENTS_AGREE:g}): not the same model or batch."
        )
    console.print(
        f"first gradients of jdml and PyTorch: {apart[worst]:.1e} apart at most ({worst})"
    )


def report(options: Options, results: dict[str, Result]) -> list[Table]:
    """One table for all rates, and one row per method of how well it learns."""
    target, exact = options.target, results.get(EXACT)
    learning = Table(
        title=f"Validation loss after {options.task.steps} steps, nats per byte",
        caption=machine("jax", "torch"),
    )
    learning.add_column("method", no_wrap=True)
    for heading in ("final loss", "of exact", f"steps to {target:g}", "computation, s / step"):
        learning.add_column(heading, justify="right")
    for name, r in results.items():
        steps = r.steps_to(target)
        learning.add_row(
            name,
            f"{r.final_loss:.4f}",
            f"{100 * (r.final_loss / exact.final_loss - 1):+.2f} %" if exact else "",
            "not reached" if steps is None else f"{steps:.0f}",
            f"{r.compute_seconds:.3f}",
        )
    tables = [learning]
    for rate in (f"{rate:g}" for rate in options.rates):
        table = Table(title=f"Time to {target:g} over {rate} Mbit/s")
        table.add_column("method", no_wrap=True)
        headings = ("MB / step", "step, s", "of it exchange", "time to loss, s", "DDP f32 takes")
        for heading in headings:
            table.add_column(heading, justify="right")
        base = results[DDP].seconds_to(target, rate) if DDP in results else None
        for name, r in results.items():
            seconds = r.seconds_to(target, rate)
            table.add_row(
                name,
                f"{r.rates[rate].sent_bytes / 1e6:.2f}",
                f"{r.rates[rate].step_seconds:.3f}",
                f"{r.exchange_seconds(rate):.3f}",
                "not reached" if seconds is None else f"{seconds:.0f}",
                f"{base / seconds:.1f} ×" if base and seconds else "",
            )
        tables.append(table)
    return tables


def runnable(options: Options) -> tuple[Options, list[str]]:
    """The options with what this machine can run, and what was left out and why.

    Raises:
      ValueError: no such method.
    """
    torch = options.torch and importlib.util.find_spec("torch") is not None
    for name in options.methods:
        if not name.startswith(TORCH) and name != ONE_BIT_ADAM:
            method(name)
    kept = tuple(n for n in options.methods if torch or not n.startswith(TORCH))
    missing = options.torch and not torch
    remark = "PyTorch is not installed here: its rows are left out (make bench-peers)."
    return dataclasses.replace(options, methods=kept), [remark] if missing else []


def main(options: Options) -> int:
    """Measures, prints tables and targets, draws; status 1 if a target is missed."""
    console = console_of_tables()
    options, remarks = runnable(options)
    for remark in remarks:
        console.print(remark, markup=False)
    try:
        results = run(options, console)
    except NamespacesUnavailable as error:
        console.print(f"time to loss skipped: {error}", markup=False)
        return 0
    for table in report(options, results):
        console.print(table)
    how = "each link" if options.full else "unshaped links, then timed over each"
    console.print(f"trained to the end over {how}; losses per step equal bit for bit", markup=False)
    lines = verdicts(results, options.target, f"{min(options.rates):g}")
    for line in lines:
        console.print(str(line), markup=False, highlight=False)
    with contextlib.suppress(ImportError):
        from benchmarks.time_to_loss.picture import draw

        rates = [f"{rate:g}" for rate in options.rates]
        path = draw(results, rates, options.target, options.out / "time_to_loss.png")
        console.print(f"picture: {path}")
    return 0 if all(line.met for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
