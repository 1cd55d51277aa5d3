"""Pictures and lines that compare runs."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jdml.train.loop import format_bytes

Rows = Sequence[Mapping[str, Any]]


def plot_runs(
    runs: Mapping[str, Rows],
    path: str | os.PathLike[str],
    *,
    unit: str = "nats per token",
    title: str = "",
) -> None:
    """Loss against steps and against bytes sent, one line per run, to a PNG.

    Args:
      runs: Name of a run to the rows of its metrics log.
      path: The file to write.
      unit: Of the loss.
      title: Above both panels.

    Raises:
      ImportError: matplotlib is missing; says what to install.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_runs draws with matplotlib: pip install 'jdml[plots]'") from error
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, (column, label) in zip(
        panels,
        [("step", "steps"), ("bytes_sent", "bytes that each device has sent to other workers")],
        strict=True,
    ):
        for number, (name, rows) in enumerate(runs.items()):
            colour, style = (
                f"C{number}",
                "-" if number == 0 else (0, (3, 3)),
            )  # one may hide another
            xs = [row[column] for row in rows]
            panel.plot(
                xs,
                [row["loss"] for row in rows],
                color=colour,
                alpha=0.35,
                linewidth=1,
                linestyle=style,
            )
            held_out = [
                (x, row["val_loss"]) for x, row in zip(xs, rows, strict=True) if "val_loss" in row
            ]
            panel.plot(
                *zip(*held_out, strict=True) if held_out else ([], []),
                color=colour,
                marker="o",
                linestyle=style,
                markersize=4,
                label=name,
            )
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
        if column == "bytes_sent":
            panel.xaxis.set_major_formatter(lambda x, _: format_bytes(x).replace(".00", ""))
    panels[0].set_ylabel(f"loss, {unit}")
    panels[0].legend(title="validation (faint: training)")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def comparison(name: str, rows: Rows, baseline: str, baseline_rows: Rows, unit: str) -> str:
    """One line: final validation loss and bytes of a run beside a baseline's."""
    mine, theirs = rows[-1], baseline_rows[-1]
    gap = mine["val_loss"] / theirs["val_loss"] - 1
    share = mine["bytes_sent"] / theirs["bytes_sent"] if theirs["bytes_sent"] else float("nan")
    return (
        f"{name}: validation loss {mine['val_loss']:.4f} {unit} with "
        f"{format_bytes(mine['bytes_sent'])} sent per device; {baseline}: "
        f"{theirs['val_loss']:.4f} with {format_bytes(theirs['bytes_sent'])}. "
        f"{name} is {gap:+.2%} in loss and {share:.3f} × in bytes."
    )


def write_report(
    folder: str | os.PathLike[str], runs: Mapping[str, Rows], lines: Sequence[str], **plot: Any
) -> Path:
    """Writes ``metrics.jsonl`` (all rows), ``loss.png`` and ``summary.txt``; the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.jsonl").open("w") as file:
        for name, rows in runs.items():
            file.writelines(json.dumps({"run": name, **row}) + "\n" for row in rows)
    (folder / "summary.txt").write_text("".join(line + "\n" for line in lines))
    plot_runs(runs, folder / "loss.png", **plot)
    return folder
