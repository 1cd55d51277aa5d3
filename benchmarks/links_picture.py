"""The picture of the links benchmark: bytes, and measured beside predicted time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def draw(measured: Mapping[str, Any], title: str, path: Path) -> Path:
    """Two panels of bars, a method in each row.

    Args:
      measured: ``Measured`` by method.
      title: Above both.
      path: Of the PNG.

    Raises:
      ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(measured)[::-1]
    rows = range(len(names))
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(10, 0.8 + 0.28 * len(names)), sharey=True, layout="constrained"
    )
    figure.suptitle(title)
    shades = ["C1" if name.startswith("torch") else "C0" for name in names]
    left.barh(rows, [measured[name].sent_bytes / 1e6 for name in names], color=shades)
    left.set(xscale="log", xlabel="MB that a worker sends, headers included")
    left.set_yticks(rows, names)
    right.barh(rows, [measured[name].seconds for name in names], color=shades)
    known = [i for i in rows if measured[names[i]].predicted is not None]
    right.plot([measured[names[i]].predicted for i in known], known, "k|", markersize=11)
    right.set(xscale="log", xlabel="seconds per mean (|: cost model)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path
