"""Tables and pictures of the gossip experiment."""

from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from experiments.gossip.config import Config
from jdml.communicate.topology import Graph
from jdml.train.loop import format_bytes

Rows = list[dict[str, Any]]
ROUNDING = 1e-5
"""Distances, relative to the first, below which f32 begins to show."""


def pick(rows: Rows, part: str) -> dict[str, Rows]:
    """The rows of one part of the experiment by name."""
    names = dict.fromkeys(r["name"] for r in rows if r["part"] == part)
    return {n: [r for r in rows if (r["part"], r["name"]) == (part, n)] for n in names}


def decay(distances: list[float], period: int) -> float | None:
    """Factor per round in the long run, from the second half of what is above rounding.

    Whole periods, so that all rounds of a sequence count alike; ``None`` if too few are left.
    """
    last = sum(1 for d in distances if d > ROUNDING) - 1
    num_rounds = max(last // 2 // period, 1) * period
    if num_rounds < 2 or last < num_rounds:
        return None
    return float((distances[last] / distances[last - num_rounds]) ** (1 / num_rounds))


def averaging_table(graphs: dict[str, Graph], rows: Rows) -> Table:
    """What each graph promises beside what was measured."""
    workers = next(iter(graphs.values())).num_workers
    table = Table(
        title=f"Pure averaging, {workers} workers: factor of the distance per round, promised by "
        "the spectral gap and measured",
        box=box.MARKDOWN,
    )
    table.add_column("graph", no_wrap=True)
    for column in (
        "bytes a round",
        "gap",
        "of rounds",
        "promised",
        "measured",
        f"rounds to {ROUNDING:.0e}",
        "bytes to it",
    ):
        table.add_column(column, justify="right")
    for name, mine in pick(rows, "averaging").items():
        graph = graphs[name]
        left = 1 - graph.spectral_gap
        measured = decay([r["distance"] for r in mine], graph.period)
        there = next((r for r in mine if r["distance"] <= ROUNDING), None)
        table.add_row(
            name,
            format_bytes(mine[1]["bytes_sent"]),
            f"{graph.spectral_gap:.4f}",
            str(graph.period),
            f"{left ** (1 / graph.period):.4f}" if left > 1e-9 else "0",
            "0" if measured is None else f"{measured:.4f}",
            str(there["round"]) if there else "–",
            format_bytes(there["bytes_sent"]) if there else "–",
        )
    return table


def compressed_table(config: Config, rows: Rows) -> Table:
    """How near to each other the workers came on the ring."""
    table = Table(
        title=f"Averaging on the ring, {config.workers} workers, {config.averaging.elements:,} "
        "elements: distance, relative to the first",
        box=box.MARKDOWN,
    )
    table.add_column("", no_wrap=True)
    for column in ("bytes a round", "rounds", "distance", "bytes", "the mean moved by"):
        table.add_column(column, justify="right")
    for name, mine in pick(rows, "compressed").items():
        table.add_row(
            name,
            format_bytes(mine[1]["bytes_sent"]),
            f"{mine[-1]['round']:,}",
            f"{mine[-1]['distance']:.1e}",
            format_bytes(mine[-1]["bytes_sent"]),
            f"{mine[-1]['mean_moved']:.0e}",
        )
    return table


def training_table(config: Config, rows: Rows) -> Table:
    """Where training ended."""
    table = Table(
        title=f"Digits, {config.workers} workers, alpha {config.training.alpha}, after "
        f"{config.training.steps} steps: mean of {len(config.seeds)} runs ± deviation",
        box=box.MARKDOWN,
    )
    table.add_column("", no_wrap=True)
    for column in (
        "bytes a step",
        "consensus distance",
        "test loss, own models",
        "test loss, their mean",
        "accuracy in %, own",
        "their mean",
    ):
        table.add_column(column, justify="right")
    for name, mine in pick(rows, "training").items():
        last = [r for r in mine if r["step"] == config.training.steps]
        cells = [f"{np.mean([r['distance'] for r in last]):.3f}"]
        for key, scale, digits in (
            ("loss_own", 1, 3),
            ("loss_mean", 1, 3),
            ("accuracy_own", 100, 1),
            ("accuracy_mean", 100, 1),
        ):
            values = [scale * r[key] for r in last]
            cells.append(f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}")
        table.add_row(name, format_bytes(last[0]["bytes_sent"] / config.training.steps), *cells)
    return table


def plot_averaging(rows: Rows, path: Path) -> None:
    """Distance against rounds on each graph; with compressed payloads, against rounds and bytes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6), layout="constrained")
    by_graph, by_round, by_bytes = figure.subplots(1, 3, sharey=True)
    for number, (name, mine) in enumerate(pick(rows, "averaging").items()):
        _line(by_graph, mine, "round", f"C{number}", name)
    for number, (name, mine) in enumerate(pick(rows, "compressed").items()):
        _line(by_round, mine, "round", f"C{number}", name)
        _line(by_bytes, mine, "bytes_sent", f"C{number}", name)
    by_graph.set_title("exact values", fontsize=10)
    by_graph.set_ylabel("consensus distance, relative to the first")
    by_round.set_title("on the ring, compressed", fontsize=10)
    by_bytes.set_title("the same against bytes", fontsize=10)
    for panel in (by_graph, by_round):
        panel.set_xscale("symlog", linthresh=1)
        panel.set_xlim(left=0)
        panel.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        panel.set_xlabel("rounds")
        panel.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
    by_bytes.set_xlabel("bytes that each device has sent")
    by_bytes.set_xscale("log")
    by_bytes.xaxis.set_major_formatter(lambda x, _: format_bytes(x).replace(".00", ""))
    for panel in (by_graph, by_round, by_bytes):
        panel.set_yscale("log")
        panel.set_ylim(1e-7, 2)
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=80)


def plot_training(rows: Rows, path: Path) -> None:
    """Consensus distance, and the workers' own loss against steps and bytes; means over seeds."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    figure = Figure(figsize=(12, 4.4), layout="constrained")
    panels = figure.subplots(1, 3)
    axes = (("step", "distance"), ("step", "loss_own"), ("bytes_sent", "loss_own"))
    for number, (name, mine) in enumerate(pick(rows, "training").items()):
        for panel, (x, y) in zip(panels, axes, strict=True):
            steps = list(dict.fromkeys(r["step"] for r in mine))
            at = [[r for r in mine if r["step"] == s] for s in steps]
            xs = [group[0][x] for group in at]
            ys = [np.mean([r[y] for r in group]) for group in at]
            style = "k" if name == "all-reduce" else f"C{number}"
            if not (name == "all-reduce" and y == "distance"):
                panel.plot(xs[1:], ys[1:], style, lw=1.2, label=name)
    panels[0].set_ylabel("consensus distance")
    for panel in panels:
        panel.set_yscale("log")
        panel.set_xlabel("steps")
        panel.grid(alpha=0.3)
    panels[0].set_ylim(bottom=0.03)  # on the complete graph it is rounding
    for panel in panels[1:]:
        panel.set_ylabel("test loss of the workers' own models")
        panel.yaxis.set_major_locator(FixedLocator([0.1, 0.2, 0.5, 1, 2]))
        panel.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        panel.yaxis.set_minor_locator(NullLocator())
    panels[2].set_xlabel("bytes that each device has sent")
    panels[2].set_xscale("log")
    panels[2].xaxis.set_major_formatter(lambda x, _: format_bytes(x).replace(".00", ""))
    figure.legend(
        *panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8
    )
    figure.savefig(path, dpi=80)


def _line(panel: Any, rows: Rows, x: str, colour: str, name: str) -> None:
    """At most about 500 points of a curve, without those at rounding."""
    kept = rows[:: max(1, len(rows) // 500)]
    xs = [r[x] for r in kept if r["distance"] > 0]
    panel.plot(xs, [r["distance"] for r in kept if r["distance"] > 0], colour, lw=1.2, label=name)
