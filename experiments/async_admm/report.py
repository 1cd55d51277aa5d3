"""The table and the picture of the asynchronous ADMM experiment."""

from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from experiments.async_admm.config import Config

Rows = list[dict[str, Any]]


def of(rows: Rows, **wanted: Any) -> Rows:
    """The rows that say so."""
    return [r for r in rows if all(r[k] == v for k, v in wanted.items())]


def named(config: Config, barrier: tuple[int, int]) -> str:
    """``S = 8, τ = 2``; what is synchronous says so."""
    reports, age = barrier
    note = " (synchronous)" if reports == config.workers or age == 1 else ""
    return f"S = {reports}, τ = {age}{note}"


def agrees(config: Config, rows: Rows) -> dict[str, Any] | None:
    """The first round from which on the objective agrees with the central solver's."""
    apart = [i for i, r in enumerate(rows) if not abs(r["gap"]) <= config.target]
    first = max(apart, default=-1) + 1
    return rows[first] if first < len(rows) else None


def to_target(config: Config, rows: Rows, clock: str, barrier: tuple[int, int], column: str) -> Any:
    """Rounds or virtual seconds to it, ``[seed]``; NaN where it was not reached."""
    found = [
        agrees(config, of(rows, clock=clock, reports=barrier[0], age=barrier[1], seed=s))
        for s in config.seeds
    ]
    return np.array([np.nan if row is None else row[column] for row in found], float)


def table_of(config: Config, clock: str, rows: Rows) -> Table:
    """A line for each barrier."""
    table = Table(
        title=f"{clock}: to a relative difference of {config.target:g} from the central solver; "
        f"{len(config.seeds)} runs, mean ± deviation",
        box=box.MARKDOWN,
    )
    table.add_column("", no_wrap=True)
    first = "S = {}, τ = {}".format(*config.barriers[0])
    for heading in ("rounds", "virtual s of a round", "virtual s", f"of {first}"):
        table.add_column(heading, justify="right")
    base = to_target(config, rows, clock, config.barriers[0], "virtual_seconds")
    for barrier in config.barriers:
        last = [
            of(rows, clock=clock, reports=barrier[0], age=barrier[1], seed=s)[-1]
            for s in config.seeds
        ]
        rounds, time = (
            to_target(config, rows, clock, barrier, c) for c in ("round", "virtual_seconds")
        )
        table.add_row(
            named(config, barrier),
            shown(rounds, 0),
            shown(np.array([r["virtual_seconds"] / r["round"] for r in last]), 2),
            shown(time, 1),
            shown(time / base, 2),
        )
    return table


def shown(values: np.ndarray, digits: int) -> str:
    """Mean and deviation; a dash if not all runs got there."""
    if not np.isfinite(values).all():
        return "–"
    return f"{values.mean():.{digits}f} ± {values.std():.{digits}f}"


def plot(config: Config, rows: Rows, path: Path) -> None:
    """The objective against rounds and against virtual time, and the residuals; a row a clock."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 2.9 * len(config.clocks) + 0.4), layout="constrained")
    panels = figure.subplots(len(config.clocks), 3, squeeze=False)
    for clock, (by_round, by_time, residual) in zip(config.clocks, panels, strict=True):
        seed = config.seeds[0]
        of_run = {
            (s, tau): of(rows, clock=clock, reports=s, age=tau, seed=seed)
            for s, tau in config.barriers
        }
        there = [agrees(config, mine) or mine[-1] for mine in of_run.values()]
        last = {c: 1.2 * max(row[c] for row in there) for c in ("round", "virtual_seconds")}
        for number, (barrier, mine) in enumerate(of_run.items()):
            look = {"color": f"C{number}", "lw": 1.2, "label": named(config, barrier)}
            for panel, x, y in (
                (by_round, "round", "gap"),
                (by_time, "virtual_seconds", "gap"),
                (residual, "virtual_seconds", "primal"),
            ):
                shown_rows = [r for r in mine if r[x] <= last[x]]
                values = np.maximum(np.abs([r[y] for r in shown_rows]), config.target / 10)
                panel.plot([r[x] for r in shown_rows], values, **look)
        for panel in (by_round, by_time):
            panel.axhline(config.target, color="0.4", lw=0.8, ls=":")
            panel.set_ylim(config.target / 5, 10)
        for panel in (by_round, by_time, residual):
            panel.set_xlim(left=0)
            panel.set_yscale("log")
            panel.grid(alpha=0.3)
        by_round.set_ylabel(f"{clock}\nobjective, relative difference")
        residual.set_ylabel("primal residual")
    panels[-1][0].set_xlabel("rounds")
    panels[-1][1].set_xlabel("virtual seconds")
    panels[-1][2].set_xlabel("virtual seconds")
    figure.legend(
        *panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8
    )
    figure.savefig(path, dpi=75, pil_kwargs={"optimize": True})
