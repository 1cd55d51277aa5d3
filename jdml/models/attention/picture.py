"""A picture of a ring's rounds: which queries meet which keys when, and who has how much to do."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jdml.models.attention.order import ORDERS, Order, positions

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def rounds(axis_size: int, order: Order) -> tuple[np.ndarray, np.ndarray]:
    """When pairs of chunks meet in a causal ring, of 2K chunks of the text.

    Returns:
      int [2K, 2K]: the round in which queries of chunk i meet keys of chunk j, −1 for never; and
      float [K, K]: how many pairs of chunks a device (row) computes in a round (column), one on
      the diagonal counted half.
    """
    held = np.asarray(positions(2 * axis_size, axis_size, order)).reshape(axis_size, 2)
    device = np.empty(2 * axis_size, int)
    device[held] = np.arange(axis_size)[:, None]
    when = (device[:, None] - device[None, :]) % axis_size
    when[np.triu_indices(2 * axis_size, 1)] = -1
    work = np.zeros((axis_size, axis_size))
    for i, j in zip(*np.nonzero(when >= 0), strict=True):
        work[device[i], when[i, j]] += 0.5 if i == j else 1
    return when, work


def draw_rounds(axis_size: int = 4, file: str | Path | None = None) -> "Figure":
    """Draws both orders: above, in which round chunks meet; below, each device's pairs of chunks.

    Args:
      axis_size: number of devices K, up to about eight.
      file: where to write the picture; its ending says the format.

    Raises:
      ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("draw_rounds: a picture needs matplotlib; install jdml[plots].") from error
    figure = Figure(figsize=(8.2, 6.4), layout="constrained")
    panels = figure.subplots(2, 2, height_ratios=(2.4, 1))
    colours = colormaps["viridis"](np.linspace(0.15, 0.95, axis_size))
    chunks = 2 * axis_size
    for column, order in enumerate(ORDERS):
        when, work = rounds(axis_size, order)  # type: ignore[arg-type]
        held = np.asarray(positions(chunks, axis_size, order))  # type: ignore[arg-type]
        owner = np.argsort(held) // 2
        above, below = panels[:, column]
        image = np.ones((chunks, chunks, 3))
        image[when >= 0] = colours[when[when >= 0], :3]
        above.imshow(image)
        for i, j in zip(*np.nonzero(when >= 0), strict=True):
            dark = when[i, j] < axis_size / 2
            above.text(
                j, i, when[i, j], ha="center", va="center", color="white" if dark else "black"
            )
        above.set_xticks(range(chunks), [f"{c}\non {d}" for c, d in enumerate(owner)], fontsize=8)
        above.set_yticks(range(chunks), [f"{c} on {d}" for c, d in enumerate(owner)], fontsize=8)
        above.set_xlabel("keys: chunk of the text, on device")
        above.set_title(f"{order}: the round in which chunks meet")
        start = np.zeros(axis_size)
        for number in range(axis_size):
            below.barh(
                range(axis_size), work[:, number], left=start, color=colours[number],
                edgecolor="white",
            )  # fmt: skip
            start += work[:, number]
        below.set_yticks(range(axis_size), [f"device {d}" for d in range(axis_size)])
        below.invert_yaxis()
        below.set_xlim(0, 4 * axis_size - 1)
        below.set_xticks(range(0, 4 * axis_size, 2))
        waits = work.max(axis=0).sum()
        below.axvline(waits, color="crimson", linestyle="--")
        below.set_xlabel(f"pairs of chunks; rounds in step take {waits:g} (dashed)")
    panels[0, 0].set_ylabel("queries")
    if file is not None:
        figure.savefig(file, dpi=90)
    return figure
