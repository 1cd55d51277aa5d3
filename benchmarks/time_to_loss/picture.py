"""The picture: validation loss against time over each link."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.time_to_loss.results import TORCH, Result


def draw(results: Mapping[str, Result], rates: Sequence[str], target: float, path: Path) -> Path:
    """One panel for each rate, and one that splits a step into computation and exchange.

    Args:
      results: By method.
      rates: Mbit/s, as results name them.
      target: Validation loss to reach, a line.
      path: Of the PNG.

    Raises:
      ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    theirs = [name for name in results if name.startswith(TORCH)]
    colours = {name: f"C{i % 10}" for i, name in enumerate(results)}
    # Theirs in greys, dark to light: by name they are in the lower panels.
    colours |= {name: str(0.7 * i / max(1, len(theirs))) for i, name in enumerate(theirs)}
    figure, panels = pyplot.subplots(
        2, len(rates), figsize=(4.6 * len(rates), 7.4), squeeze=False, layout="constrained"
    )
    for (curves, bars), rate in zip(panels.T, rates, strict=True):
        for name, r in results.items():
            curves.plot(
                [r.rates[rate].seconds_of(step) for step, _ in r.validation],
                [loss for _, loss in r.validation],
                linestyle="--" if name.startswith(TORCH) else "-",
                color=colours[name],
                label=name,
            )
        losses = [r.final_loss for r in results.values()]
        curves.axhline(target, color="grey", linewidth=0.8)
        curves.set(xscale="log", xlabel="seconds", title=f"{rate} Mbit/s")
        curves.set_ylim(min(losses) - 0.05, target + 1.0)
        names = list(results)[::-1]
        computed = [results[name].compute_seconds for name in names]
        exchanged = [max(0.0, results[name].exchange_seconds(rate)) for name in names]
        bars.barh(names, computed, color="lightgrey", label="computation")
        shown = [colours[name] for name in names]
        bars.barh(names, exchanged, left=computed, color=shown, label="exchange")
        bars.set(xlabel="seconds per step (grey: computation)")
        if rate != rates[0]:
            bars.set_yticklabels([])
    panels[0][0].set_ylabel("validation loss, nats per byte")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
    return path
