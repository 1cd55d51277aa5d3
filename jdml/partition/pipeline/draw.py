"""Pictures of timelines: a bar for each operation, a panel for each schedule."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jdml.partition.pipeline.simulate import Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = {
    "F": ("#9ecae1", "#4292c6", "#6baed6", "#c6dbef"),
    "B": ("#a1d99b", "#41ab5d", "#74c476", "#c7e9c0"),
    "W": ("#fdd0a2", "#f16913", "#fd8d3c", "#fee6ce"),
}
_MOST_NUMBERS = 60
"""With more operations than this on a stage their numbers would not be legible."""


def draw(timelines: Timeline | Sequence[Timeline], file: str | Path | None = None) -> "Figure":
    """Draws timelines on one axis of time, with each one's bubble and activations.

    Bars carry the number of their micro-batch; shades tell a stage's chunks apart.

    Args:
      timelines: From :func:`jdml.partition.pipeline.simulate`.
      file: Where to write the picture; its ending says the format (``.png``, ``.svg``, ``.pdf``).

    Raises:
      ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ValueError("draw: a picture needs matplotlib; install jdml[plots].") from error
    shown = [timelines] if isinstance(timelines, Timeline) else list(timelines)
    height = sum(0.55 + 0.24 * len(timeline.stages) for timeline in shown)
    figure = Figure(figsize=(9, height + 0.4), layout="constrained")
    panels = figure.subplots(
        len(shown),
        1,
        squeeze=False,
        sharex=True,
        height_ratios=[len(timeline.stages) for timeline in shown],
    )
    span = max(timeline.span for timeline in shown)
    for panel, timeline in zip(panels[:, 0], shown, strict=True):
        _panel(panel, timeline)
        panel.set_xlim(0, span)
    kinds = {p.op.kind for timeline in shown for row in timeline.stages for p in row}
    names = {"F": "forward", "B": "backward", "W": "parameters' gradients"}
    figure.legend(
        handles=[Patch(color=_COLOURS[k][1], label=names[k]) for k in "FBW" if k in kinds],
        loc="outside lower center",
        ncols=3,
        fontsize=8,
        frameon=False,
    )
    if file is not None:
        figure.savefig(file, dpi=110)
    return figure


def _panel(panel: "Axes", timeline: Timeline) -> None:
    for stage, row in enumerate(timeline.stages):
        for p in row:
            shades = _COLOURS[p.op.kind]
            panel.barh(
                stage,
                p.end - p.start,
                left=p.start,
                height=0.9,
                color=shades[p.op.chunk % len(shades)] if timeline.chunks > 1 else shades[2],
                edgecolor="white",
                linewidth=0.5,
            )
            if len(row) <= _MOST_NUMBERS:
                panel.text(
                    (p.start + p.end) / 2,
                    stage,
                    str(p.op.micro_batch),
                    ha="center",
                    va="center_baseline",
                    fontsize=6,
                )
    held = ", ".join(f"{n / timeline.chunks:.3g}" for n in timeline.peak_activations)
    panel.set_title(
        f"{timeline.name}: {timeline.span:g} in all, bubble {timeline.bubble:.1%}, "
        f"most activations held by each stage {held}",
        fontsize=8,
        loc="left",
    )
    panel.set_yticks(
        range(len(timeline.stages)), [f"stage {s}" for s in range(len(timeline.stages))]
    )
    panel.invert_yaxis()
    panel.tick_params(labelsize=7, length=0)
    panel.spines[["top", "right", "left"]].set_visible(False)
