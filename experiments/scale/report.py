"""The tables and the picture of the scale experiment."""

from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from experiments.curves import reached
from experiments.scale.config import Config

Rows = list[dict[str, Any]]


def training_table(config: Config, runs: Rows, rows: Rows) -> Table:
    """A line for each method."""
    table = Table(
        title=f"{config.workers[-1]:,} workers, {config.virtual_seconds:g} virtual seconds",
        box=box.MARKDOWN,
    )
    table.add_column("", no_wrap=True)
    for heading in (
        "updates / virtual s",
        "waiting",
        "mean staleness",
        "refused",
        "last loss",
        f"virtual s to {config.target:g}",
        "wall s",
        "events",
        "memory grown",
    ):
        table.add_column(heading, justify="right")
    for run in runs:
        mine = [r for r in rows if r["method"] == run["method"]]
        there = reached(mine, config.target, "virtual_seconds")
        table.add_row(
            run["method"],
            f"{run['updates'] / run['virtual_seconds']:.0f}",
            f"{100 * run['waiting']:.0f} %",
            f"{run['staleness']:.2f}",
            f"{100 * run['refused'] / max(run['refused'] + run['updates'], 1):.0f} %",
            f"{mine[-1]['loss']:.3f}",
            f"{there:.1f}" if np.isfinite(there) else "–",
            f"{run['wall_seconds']:.1f}",
            f"{run['events']:,}",
            f"{run['grown_bytes'] / 1e6:.0f} MB",
        )
    return table


def cost_table(config: Config, costs: Rows) -> Table:
    """Thousands of events per second of processor time (of wall time), without gradients."""
    table = Table(
        title="thousand events per second of processor time, without gradients (of wall time)",
        box=box.MARKDOWN,
    )
    table.add_column("", no_wrap=True)
    cases = list(dict.fromkeys((c["parameters"], c["workers"]) for c in costs))
    for parameters, workers in cases:
        table.add_column(f"{workers:,} workers, {parameters:,} parameters", justify="right")
    for name in config.methods:
        cells = []
        for case in cases:
            (c,) = [
                c for c in costs if (c["method"], c["parameters"], c["workers"]) == (name, *case)
            ]
            rates = (c["events"] / c[f"{kind}_seconds"] / 1e3 for kind in ("process", "wall"))
            cells.append("{:.0f} ({:.0f})".format(*rates))
        table.add_row(name, *cells)
    return table


def plot(config: Config, costs: Rows, rows: Rows, path: Path) -> None:
    """Loss against virtual time, and the speed of the simulation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    of_loss, of_cost = figure.subplots(1, 2)
    for number, name in enumerate(config.methods):
        mine = [r for r in rows if r["method"] == name]
        of_loss.plot(
            [r["virtual_seconds"] for r in mine],
            [r["loss"] for r in mine],
            f"C{number}",
            lw=1.3,
            label=name,
        )
        for style, parameters in zip(
            ("-o", ":o"), sorted({c["parameters"] for c in costs}), strict=True
        ):
            speed = [
                (c["workers"], c["events"] / c["process_seconds"])
                for c in costs
                if (c["method"], c["parameters"]) == (name, parameters)
            ]
            of_cost.plot(*zip(*speed, strict=True), f"C{number}{style}", ms=4, lw=1.2)
    of_loss.axhline(config.target, color="0.4", lw=0.8, ls=":")
    of_loss.set_yscale("log")
    of_loss.set_xlabel("virtual seconds")
    of_loss.set_ylabel("training loss, nats")
    of_loss.set_title(f"{config.workers[-1]:,} workers", fontsize=10)
    of_loss.legend(fontsize=8)
    of_cost.set_xscale("log")
    of_cost.set_xticks(config.workers, [f"{n:,}" for n in config.workers])
    of_cost.minorticks_off()
    of_cost.set_ylim(bottom=0)
    of_cost.yaxis.set_major_formatter(lambda y, _: f"{y / 1e3:g}k")
    of_cost.set_xlabel("workers")
    of_cost.set_ylabel("events per second of processor time")
    sizes = sorted({c["parameters"] for c in costs})
    of_cost.set_title(f"without gradients; dotted: {sizes[-1]:,} parameters", fontsize=10)
    for panel in (of_loss, of_cost):
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=75, pil_kwargs={"optimize": True})
