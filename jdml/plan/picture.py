"""A plan as a picture: where the time of a step goes, and what a chip holds."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jdml.plan.layout import Layout
from jdml.plan.planner import Plan
from jdml.plan.program import Compiled
from jdml.plan.report import CLASSES
from jdml.plan.roofline import Prediction

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_BARS = 8
_COLOURS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377")


def draw(plan: Plan, file: str | Path) -> "Figure":
    """Draws the best meshes: on the left the step's predicted time, on the right its memory.

    A mesh that was compiled has a second bar of what the compiler says. The line is what a program
    may use.

    Args:
      plan: What to draw.
      file: Where to; its ending says the format.

    Raises:
      ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("draw: a picture needs matplotlib; install jdml[plots]") from error
    best = plan.ranked[:_MOST_BARS]
    figure = Figure(figsize=(11, 1.6 + 0.45 * len(best)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _times(left, best)
    _memories(right, plan, best)
    left.set_yticks(range(len(best)), [_label(p.layout) for p in best], fontsize=8)
    left.invert_yaxis()
    case = plan.case
    figure.suptitle(
        f"{case.config.num_params / 1e9:.2f} billion parameters on {case.topology}, "
        f"{case.batch} × {case.seq} tokens, {case.algorithm.name}",
        fontsize=11,
    )
    figure.savefig(file, dpi=120)
    return figure


def _label(layout: Layout) -> str:
    pipelined = f"\n{layout.micro_batches} micro-batches" if layout.stage > 1 else ""
    return layout.mesh + pipelined


def _times(panel: "Axes", best: tuple[Prediction, ...]) -> None:
    parts: dict[str, list[float]] = {
        "products": [p.compute_seconds for p in best],
        "memory, beyond products": [max(p.memory_seconds - p.compute_seconds, 0.0) for p in best],
        "weights and gradients, beyond both": [
            max(p.hidden_seconds - max(p.compute_seconds, p.memory_seconds), 0.0) for p in best
        ],
        "exchanges waited for": [p.exposed_seconds for p in best],
        "bubble": [p.bubble_seconds for p in best],
        "between slices": [p.slow_seconds for p in best],
    }
    _stack(panel, parts, range(len(best)), 0.7, 1e3)
    panel.set_xlabel("predicted time of a step, at least (ms)")
    panel.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.1))


def _memories(panel: "Axes", plan: Plan, best: tuple[Prediction, ...]) -> None:
    compiled = {k: v for k, v in plan.compiled.items() if isinstance(v, Compiled)}
    where: list[float] = []
    memories: list[Any] = []
    for place, one in enumerate(best):
        twice = one.layout in compiled
        where.append(place - 0.19 if twice else place)
        memories.append(one.memory)
        if twice:
            where.append(place + 0.19)
            memories.append(compiled[one.layout].memory)
            panel.annotate(
                "compiled", (memories[-1].total / 1e9, place + 0.19), fontsize=7, va="center"
            )
    parts = {name: [getattr(memory, name) for memory in memories] for name in CLASSES}
    _stack(panel, parts, where, 0.36, 1e-9)
    panel.axvline(best[0].capacity / 1e9, color="black", linewidth=1, linestyle="--")
    panel.set_xlabel("GB on a chip; the line: what there is")
    panel.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.1))


def _stack(
    panel: "Axes", parts: dict[str, list[Any]], where: Any, height: float, scale: float
) -> None:
    starts = [0.0] * len(where)
    for (name, sizes), colour in zip(parts.items(), _COLOURS, strict=False):
        lengths = [scale * size for size in sizes]
        panel.barh(list(where), lengths, height, left=starts, color=colour, label=name)
        starts = [a + b for a, b in zip(starts, lengths, strict=True)]
