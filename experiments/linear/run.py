"""Every method × division of two logistic regressions: rounds, bytes, time.

python experiments/linear/run.py --help
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2]))  # a clone's root, for `experiments` itself

from experiments.linear.config import Config
from experiments.linear.data import DATA
from experiments.linear.measure import Bench, Result
from jdml.models.linear import LinearProblem, l2, logistic
from jdml.optimize import newton_cholesky, solve
from jdml.partition import (
    Choice,
    balanced_features,
    choose_partition,
    contiguous_features,
    nonzeros_of_columns,
)

Row = dict[str, Any]
POINTS = 200
"""Most points of a curve that are kept."""


def main(config: Config) -> None:
    """All tables, a picture."""
    jax.config.update("jax_num_cpu_devices", config.workers)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    rows, choices, refused = fill(config, console)
    write_report(config, rows, choices, refused, console)


def fill(config: Config, console: Console) -> tuple[list[Row], dict[str, Choice], list[str]]:
    """Rows of all that could be done, what ``choose_partition`` says, and what was refused."""
    rows: list[Row] = []
    choices: dict[str, Choice] = {}
    refused: list[str] = []
    with jax.enable_x64(True), Progress(console=console, transient=True) as bar:
        todo = len(config.data) * len(config.divisions) * len(config.methods)
        task = bar.add_task("", total=todo)
        for name in config.data:
            x, y = (part[:: config.shrink] for part in DATA[name].load())
            choices[name] = choose_partition(*x.shape, np.count_nonzero(dense(x)), config.workers)
            problem = LinearProblem(x, y, logistic(), l2(DATA[name].strength))
            least = solve(problem, newton_cholesky(), 1e-13, 100, progress=False).value
            bench = Bench(problem, x, least, config.accuracy, config.max_rounds, config.max_seconds)
            for division in choices[name].candidates:
                if division.by not in config.divisions:
                    bar.advance(task, len(config.methods))
                    continue
                for method in config.methods:
                    bar.update(task, description=f"{name}, by {division.by}: {method}", advance=1)
                    try:
                        found = bench.measure(division.grid, method)
                    except ValueError as error:
                        refused.append(f"{name}, by {division.by}: {error}")
                        continue
                    rows.append(row_of(name, division.by, division.grid, method, found))
    return rows, choices, refused


def dense(x: Any) -> np.ndarray:
    return x if isinstance(x, np.ndarray) else x.toarray()


def row_of(data: str, by: str, grid: tuple[int, int], method: str, found: Result) -> Row:
    """With a curve of at most ``POINTS`` points."""
    kept = np.unique(np.geomspace(1, found.rounds + 1, POINTS).astype(int)) - 1
    return {
        "data": data,
        "by": by,
        "grid": grid,
        "method": method,
        "rounds": found.rounds,
        "converged": found.converged,
        "bytes": int(found.sent[-1]),
        "seconds": found.seconds,
        "compile_seconds": found.compile_seconds,
        "curve_bytes": found.sent[kept].tolist(),
        "curve_gap": found.gaps[kept].tolist(),
    }


def write_report(
    config: Config,
    rows: list[Row],
    choices: dict[str, Choice],
    refused: list[str],
    console: Console,
) -> None:
    """``metrics.jsonl``, ``summary.txt`` (printed too), ``refused.txt`` and ``linear.png``."""
    config.out.mkdir(parents=True, exist_ok=True)
    with (config.out / "metrics.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    (config.out / "refused.txt").write_text("".join(line + "\n" for line in refused))
    with (config.out / "summary.txt").open("w") as file:
        for out in (Console(file=file, width=120), console):
            for name in config.data:
                out.print(table_of(config, name, rows))
                out.print(prediction_of(name, rows, choices[name]))
                out.print(balance_of(name, choices[name]), "")
    try:
        plot(config, rows)
    except ImportError:
        console.print("No picture: pip install 'jdml[experiments]' brings matplotlib.")


def table_of(config: Config, name: str, rows: list[Row]) -> Table:
    """A line per method, three columns per division."""
    mine = [row for row in rows if row["data"] == name]
    grids = {row["by"]: row["grid"] for row in mine}
    table = Table(
        title=f"{name}, {config.workers} workers, to {config.accuracy:g} of the least objective",
        caption="kB sent by a worker; ms of all workers' work on one device; –: refused",
    )
    table.add_column("method", no_wrap=True)
    for by, (s, f) in grids.items():
        for heading in (f"by {by}\n{s} × {f}\nrounds", "\n\nkB", "\n\nms"):
            table.add_column(heading, justify="right")
    for method in config.methods:
        own = {row["by"]: row for row in mine if row["method"] == method}
        if not own:
            continue
        cells = []
        for by in grids:
            if by not in own:
                cells += ["–", "", ""]
                continue
            row = own[by]
            rounds = f"{row['rounds']:,}" if row["converged"] else f"> {row['rounds']:,}"
            cells += [rounds, f"{row['bytes'] / 1e3:,.1f}", f"{1e3 * row['seconds']:,.0f}"]
        table.add_row(method, *cells)
    return table


def prediction_of(name: str, rows: list[Row], choice: Choice) -> Table:
    """What ``choose_partition`` says of a pass, what methods of one pass a round sent, who won."""
    mine = [row for row in rows if row["data"] == name and row["converged"]]
    by_method: dict[str, dict[str, int]] = {}
    for row in mine:
        by_method.setdefault(row["method"], {})[row["by"]] = row["bytes"]
    of_all = {m: sent for m, sent in by_method.items() if len(sent) == len(choice.candidates)}
    as_chosen = [m for m, sent in of_all.items() if min(sent, key=sent.__getitem__) == choice.by]
    table = Table(
        title=f"{name}: bytes as choose_partition has them, and as measured",
        caption=(
            f"it chose by {choice.by}; so divided, {len(as_chosen)} of the {len(of_all)} methods "
            "that go all ways sent least"
        ),
    )
    table.add_column("division", no_wrap=True)
    for heading in (
        "a pass, predicted", "a round of gradient descent", "fewest to the end", "by"
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for division in choice.candidates:
        here = {row["method"]: row for row in mine if row["by"] == division.by}
        if not here:
            continue
        best = min(here.values(), key=lambda row: row["bytes"])
        descent = here.get("gradient descent")
        s, f = division.grid
        table.add_row(
            f"by {division.by}, {s} × {f}",
            f"{division.sent_bytes:,}",
            f"{descent['bytes'] / descent['rounds']:,.0f}" if descent else "",
            f"{best['bytes']:,}",
            best["method"],
        )
    return table


def balance_of(name: str, choice: Choice) -> str:
    """Non-zeros of the fullest block of columns, in blocks of neighbours and balanced."""
    x, _ = DATA[name].load()
    workers = next(c.grid[1] for c in choice.candidates if c.by == "feature")
    nonzeros = nonzeros_of_columns(x)
    fullest = [
        max(int(nonzeros[part].sum()) for part in parts)
        for parts in (
            contiguous_features(len(nonzeros), workers),
            balanced_features(nonzeros, workers),
        )
    ]
    return (
        f"Of {nonzeros.sum():,} non-zeros, the fullest of {workers} blocks of neighbouring columns "
        f"has {fullest[0]:,}, of balanced ones {fullest[1]:,}."
    )


STYLES = {"sample": "-", "feature": "--", "both": ":"}


def plot(config: Config, rows: list[Row]) -> None:
    """Gap against bytes of a worker; a panel per data set, a colour per method."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    names = [m for m in config.methods if any(row["method"] == m for row in rows)]
    figure = Figure(figsize=(12, 5.4), layout="constrained")
    panels = figure.subplots(1, len(config.data), sharey=True, squeeze=False)[0]
    looks = {m: {"color": f"C{i % 10}", "lw": 1.0 if i < 10 else 2.2} for i, m in enumerate(names)}
    for panel, name in zip(panels, config.data, strict=True):
        for row in (row for row in rows if row["data"] == name):
            gaps = np.maximum(row["curve_gap"], config.accuracy / 10)
            kilobytes = np.maximum(np.array(row["curve_bytes"]), 100) / 1e3
            look = looks[row["method"]]
            panel.plot(kilobytes, gaps, STYLES[row["by"]], **look)
            panel.plot(kilobytes[-1], gaps[-1], "o", color=look["color"], ms=3.5)
        panel.axhline(config.accuracy, color="0.4", lw=1)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_ylim(config.accuracy / 20, 10)
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("kB that a worker sent")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("objective above the least, relative")
    handles = [Line2D([], [], label=m, **looks[m]) for m in names]
    handles += [Line2D([], [], color="0.3", ls=s, label=f"by {by}") for by, s in STYLES.items()]
    figure.legend(handles=handles, fontsize=8, loc="outside right upper")
    figure.savefig(config.out / "linear.png", dpi=67, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    main(tyro.cli(Config))
