"""The table and the picture of the pace experiment."""

from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from experiments.curves import reached
from experiments.pace.config import Config

Rows = list[dict[str, Any]]
POINTS = 70
"""Of a curve in the picture, at most."""


def of(rows: Rows, **wanted: Any) -> Rows:
    """The rows that say so."""
    return [r for r in rows if all(r[k] == v for k, v in wanted.items())]


def to_target(config: Config, rows: Rows, clock: str, method: str) -> np.ndarray:
    """Time to the target, ``[seed]``."""
    mine = of(rows, clock=clock, method=method)
    column = config.unit.replace(" ", "_")
    seeds = list(dict.fromkeys(r["seed"] for r in mine))
    return np.array([reached(of(mine, seed=s), config.target, column) for s in seeds])


def table_of(config: Config, clock: str, rows: Rows, runs: Rows) -> Table:
    """A line for each method: how fast it went, how stale, and when it was there."""
    column = config.unit.replace(" ", "_")
    table = Table(
        title=f"{clock}, {config.num_workers} workers: {config.unit} to a training loss of "
        f"{config.target:g}",
        box=box.MARKDOWN,
    )
    table.add_column("", no_wrap=True)
    base = to_target(config, rows, clock, config.methods[0])
    for heading in (
        "clocks per second",
        "waiting",
        "staleness, mean",
        "most",
        "refused",
        "time to it",
        f"of {config.methods[0]}",
        "last loss",
    ):
        table.add_column(heading, justify="right")
    for name in config.methods:
        mine = of(runs, clock=clock, method=name)
        time = to_target(config, rows, clock, name)
        last = [of(rows, clock=clock, method=name, seed=r["seed"])[-1]["loss"] for r in mine]
        per_second = np.mean([r["updates"] / config.num_workers / r[column] for r in mine])
        refused = np.mean([r["refused"] / max(r["refused"] + r["updates"], 1) for r in mine])
        table.add_row(
            name,
            f"{per_second:.2f}",
            f"{100 * np.mean([r['waiting'] for r in mine]):.0f} %",
            f"{np.mean([r['staleness'] for r in mine]):.1f}",
            str(max(r["most_stale"] for r in mine)),
            f"{100 * refused:.0f} %",
            shown(time, 1),
            shown(time / base, 2),
            f"{np.mean(last):.4f}",
        )
    return table


def shown(values: np.ndarray, digits: int) -> str:
    """Mean and deviation; a dash if not all runs got there."""
    if not np.isfinite(values).all():
        return "–"
    spread = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}"


def plot(config: Config, rows: Rows, runs: Rows, path: Path) -> None:
    """Loss against time, against updates, and the time to the target; a row a clock."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    column = config.unit.replace(" ", "_")
    figure = Figure(figsize=(12, 3.6 * len(config.clocks)), layout="constrained")
    panels = figure.subplots(len(config.clocks), 2, squeeze=False, width_ratios=(2, 1))
    for clock, (by_time, bars) in zip(config.clocks, panels, strict=True):
        for number, name in enumerate(config.methods):
            mine = of(rows, clock=clock, method=name)
            curves = [of(mine, seed=s) for s in dict.fromkeys(r["seed"] for r in mine)]
            few = slice(None, min(map(len, curves)), -(-min(map(len, curves)) // POINTS))
            time = np.mean([[r[column] for r in c[few]] for c in curves], axis=0)
            loss = np.exp(np.mean([[np.log(r["loss"]) for r in c[few]] for c in curves], 0))
            style = ("-", "--")[number % 2]
            by_time.plot(time, loss, f"C{number}", ls=style, lw=1.3, label=name)
            taken = to_target(config, rows, clock, name)
            if np.isfinite(taken).all():
                bars.barh(name, taken.mean(), color=f"C{number}", alpha=0.8)
                bars.plot(taken, [name] * len(taken), "k.", ms=4)
            else:
                bars.barh(name, 0)
                bars.text(0, name, " never", va="center", fontsize=8)
        by_time.axhline(config.target, color="0.4", lw=0.8, ls=":")
        by_time.set_yscale("log")
        by_time.yaxis.set_major_locator(FixedLocator([0.05, 0.1, 0.2, 0.3, 0.5, 1, 2]))
        by_time.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        by_time.yaxis.set_minor_locator(NullLocator())
        by_time.grid(alpha=0.3)
        by_time.set_ylabel(f"{clock}\ntraining loss, nats")
        by_time.set_xlim(0, config.length)
        bars.invert_yaxis()
        bars.grid(alpha=0.3, axis="x")
        bars.tick_params(axis="y", labelsize=8)
        bars.set_xlim(left=0)
    panels[0][0].legend(fontsize=8, ncols=2)
    panels[-1][0].set_xlabel(config.unit)
    panels[-1][1].set_xlabel(f"{config.unit} to a loss of {config.target:g}")
    figure.savefig(path, dpi=72, pil_kwargs={"optimize": True})
