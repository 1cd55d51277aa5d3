"""A picture of a graph: workers on a circle or grid, edges with their weights."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jdml.communicate.topology.graph import Graph, Matrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_LABELS = 40
"""More weights than this are told by the width of their lines alone."""


def draw(graph: Graph, file: str | Path | None = None) -> "Figure":
    """Draws a graph; one that changes from round to round in one panel per round.

    Lines are as wide as their weight, and say it where not all are equal. Arrows lead from a
    sender to its hearer; lines without a head go both ways. The number under a worker's is its
    weight for itself.

    Args:
      graph: Of any size; made for up to about a hundred workers.
      file: Where to write the picture; its ending says the format (``.png``, ``.svg``, ``.pdf``).

    Raises:
      ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("draw: a picture needs matplotlib; install jdml[plots].") from error
    columns = min(graph.period, 4)
    rows = -(-graph.period // columns)
    side = 4.2 if graph.period == 1 else 3.0
    figure = Figure(figsize=(side * columns, side * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    for number, panel in enumerate(panels):
        panel.set_axis_off()
        if number < graph.period:
            _panel(panel, graph, graph.at(number))
            if graph.period > 1:
                panel.set_title(f"round {number}", fontsize=9)
    of = f" over {graph.period} rounds" if graph.period > 1 else ""
    figure.suptitle(f"{graph.name}: spectral gap {graph.spectral_gap:.3g}{of}", fontsize=11)
    if file is not None:
        figure.savefig(file, dpi=150, bbox_inches="tight")
    return figure


def _panel(panel: "Axes", graph: Graph, matrix: Matrix) -> None:
    places = _places(graph)
    links = _links(matrix)
    weights = [w for _, _, w, _ in links]
    equal = bool(links) and max(weights) - min(weights) < 1e-9
    for i, j, weight, both in links:
        (x, y), (u, v) = places[i], places[j]
        distance = float(np.hypot(u - x, v - y))
        # Round the end of a grid: bent by the same height whatever the length, between the rows.
        bend = 0.56 / distance if len(graph.shape) > 1 and distance > 1.01 else 0.0
        if not both:
            bend = bend or 0.12  # two arrows between two workers would lie on each other
        panel.annotate(
            "",
            xy=(u, v),
            xytext=(x, y),
            arrowprops={
                "arrowstyle": "-" if both else "-|>",
                "connectionstyle": f"arc3,rad={bend}",
                "linewidth": 0.4 + 2.6 * weight / max(weights),
                "color": "tab:blue",
                "alpha": 0.6,
                "shrinkA": 9,
                "shrinkB": 9,
            },
        )
        if not equal and len(links) <= _MOST_LABELS:
            # The middle of the bent line, as matplotlib's arc3 bends it.
            at = (0.5 * (x + u) + 0.25 * bend * 2 * (v - y), 0.5 * (y + v) - 0.5 * bend * (u - x))
            panel.text(
                *at,
                f"{weight:.2g}",
                fontsize=6,
                ha="center",
                va="center",
                bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none"},
            )
    own = np.diag(matrix)
    one_own = np.ptp(own) < 1e-9
    for i, (x, y) in enumerate(places):
        panel.scatter([x], [y], s=230, color="white", edgecolors="tab:blue", zorder=3)
        panel.text(x, y, str(i), fontsize=8, ha="center", va="center", zorder=4)
        if not one_own:
            panel.text(
                *_outside(graph, x, y), f"{own[i]:.2g}", fontsize=6, ha="center", va="center"
            )
    told = [f"edges {weights[0]:.3g}"] if equal else []
    told += [f"own {own[0]:.3g}"] if one_own else []
    panel.text(
        0.5, 0.0, ", ".join(told), fontsize=7, ha="center", va="top", transform=panel.transAxes
    )
    panel.set_aspect("equal")
    panel.margins(0.15)


def _places(graph: Graph) -> list[tuple[float, float]]:
    """Where each worker stands: worker 0 on top of a circle, or in the corner of a grid."""
    if len(graph.shape) > 1:
        cells = (np.unravel_index(i, graph.shape) for i in range(graph.num_workers))
        return [(float(cell[-1]), -float(cell[-2])) for cell in cells]
    if graph.num_workers == 1:
        return [(0.0, 0.0)]
    angles = np.pi / 2 - 2 * np.pi * np.arange(graph.num_workers) / graph.num_workers
    return [(float(np.cos(a)), float(np.sin(a))) for a in angles]


def _outside(graph: Graph, x: float, y: float) -> tuple[float, float]:
    return (x, y - 0.22) if len(graph.shape) > 1 else (1.2 * x, 1.2 * y)


def _links(matrix: Matrix) -> list[tuple[int, int, float, bool]]:
    """``(source, target, weight, both ways alike)``."""
    links = []
    for target, source in np.argwhere(matrix):
        if target == source:
            continue
        both = bool(np.isclose(matrix[target, source], matrix[source, target]))
        if not both or source < target:
            links.append((int(source), int(target), float(matrix[target, source]), both))
    return links
