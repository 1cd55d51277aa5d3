"""The table, the targets and the picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.local_sgd.config import Config
from experiments.local_sgd.methods import DILOCO, E3M0, FEEDBACK, METHODS, SYNCHRONOUS
from jdml.communicate.cost import Link, predict
from jdml.train.loop import format_bytes

Row = dict[str, Any]
Rows = Mapping[str, Sequence[Row]]


def write_report(config: Config, rows: Rows, console: Console, title: str) -> Path:
    """``table.md``, ``summary.txt`` and ``local_sgd.png`` in the folder ``report``."""
    folder = config.out / "report"
    folder.mkdir(parents=True, exist_ok=True)
    head, body = table_of(config, rows)
    shown = Table(*head, title=f"{title}, {config.steps} steps")
    for cells in body:
        shown.add_row(*cells)
    console.print(shown)
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *body)]
    lines.insert(1, "|---|" + "---:|" * (len(head) - 1))
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    targets = verdicts(config, rows)
    (folder / "summary.txt").write_text("".join(line + "\n" for line in targets))
    for line in targets:
        console.print(line, markup=False)
    try:
        plot(rows, folder / "local_sgd.png", title)
    except ImportError:
        console.print("No picture: pip install 'jdml[plots]' brings matplotlib.", markup=False)
    console.print(f"Report: {folder}/table.md, summary.txt, local_sgd.png")
    return folder


def table_of(config: Config, rows: Rows) -> tuple[list[str], list[list[str]]]:
    """Headings, and a line per method."""
    base = rows[SYNCHRONOUS][-1] if SYNCHRONOUS in rows else None
    link = f"{config.link_mbit:g} Mbit/s, {config.link_ms:g} ms"
    head = [
        *("method", "validation loss", "of synchronous", "exchanges", "sent per device"),
        *("of synchronous", "exchanges alone, of synchronous", "seconds, simulated"),
        f"exchange, predicted for {link}",
    ]
    body = []
    for name, log in rows.items():
        last = log[-1]
        gap = share = exchanges_share = ""
        if base is not None:
            gap = f"{100 * (last['val_loss'] / base['val_loss'] - 1):+.2f} %"
            share = one_in(last["bytes_sent"], base["bytes_sent"])
            exchanges_share = one_in(exchanged(config, last), exchanged(config, base))
        body.append(
            [
                *(name, f"{last['val_loss']:.4f}", gap, f"{num_exchanges(log):,}"),
                *(format_bytes(last["bytes_sent"]), share, exchanges_share),
                f"{last['seconds']:.0f}",
                f"{exchange_seconds(config, name, log):.1f} s",
            ]
        )
    return head, body


def verdicts(config: Config, rows: Rows) -> list[str]:
    """DiLoCo's loss and bytes beside the targets."""
    lines = []
    for name, target in ((DILOCO, 50), (DILOCO + E3M0, 400), (DILOCO + E3M0 + FEEDBACK, 400)):
        if name in rows and SYNCHRONOUS in rows:
            mine, base = rows[name][-1], rows[SYNCHRONOUS][-1]
            lines.append(
                f"{name}: validation loss {mine['val_loss']:.4f}, "
                f"{100 * (mine['val_loss'] / base['val_loss'] - 1):+.2f} % of synchronous (target: "
                f"within 2 %), with {one_in(mine['bytes_sent'], base['bytes_sent'])} of its bytes, "
                f"{one_in(exchanged(config, mine), exchanged(config, base))} without the mean of "
                f"the training loss in every step (target: 1 / {target})"
            )
    return lines


def one_in(part: float, whole: float) -> str:
    """``"1 / 49.9"``."""
    return "none sent" if not part else "1" if part == whole else f"1 / {whole / part:.1f}"


def exchanged(config: Config, row: Row) -> int:
    """Bytes sent so far but for the mean of the training loss, which is for the log alone.

    Of every method the step takes it: an all-reduce of one f32.
    """
    loss = -(-2 * (config.workers - 1) * 4 // config.workers)
    return row["bytes_sent"] - row["step"] * loss


def num_exchanges(log: Sequence[Row]) -> int:
    """Of the whole model or of a fragment, those that happened."""
    named = [key for key in log[-1] if key.startswith("branch.")]
    return round(sum(row[key] for row in log for key in named)) if named else len(log)


def exchange_seconds(config: Config, name: str, log: Sequence[Row]) -> float:
    """What the exchanges would take over the link, each waited for: predicted, not measured."""
    method = METHODS[name]
    link = Link(config.link_ms / 1e3, config.link_mbit * 1e6 / 8)
    elements = config.model.num_params // max(1, method.num_fragments)
    one = predict("two_phase", config.workers, elements, method.codec, link)
    return num_exchanges(log) * one.seconds


def plot(rows: Rows, path: Path, title: str) -> None:
    """Validation loss against steps, bytes and seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    axes = (
        ("step", "steps"),
        ("bytes_sent", "bytes that each device has sent"),
        ("seconds", "seconds of one machine that simulates all workers"),
    )
    least, greatest = float("inf"), 0.0
    for number, (name, method) in enumerate(METHODS.items()):
        if name not in rows:
            continue
        held_out = [row for row in rows[name] if "val_loss" in row]
        losses = [row["val_loss"] for row in held_out]
        least = min(least, *losses)
        greatest = max(greatest, losses[min(2, len(losses) - 1)])
        for panel, (column, _) in zip(panels, axes, strict=True):
            points = [(row[column], row["val_loss"]) for row in held_out if row[column] > 0]
            panel.plot(
                *zip(*points, strict=True),
                color="black" if name == SYNCHRONOUS else f"C{number - 1}",
                linestyle=":" if method.feedback else "--" if method.compressed else "-",
                marker="." if method.outer is None else "s" if not method.num_fragments else "^",
                markersize=4,
                linewidth=1.2,
                label=name,
            )
    for panel, (_, label) in zip(panels, axes, strict=True):
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    panels[0].set_ylim(least - 0.03 * (greatest - least), greatest)
    panels[0].set_ylabel("validation loss, nats per byte")
    panels[0].legend(fontsize=8)
    panels[1].set_xscale("log")
    panels[1].xaxis.set_major_formatter(lambda x, _: format_bytes(x).replace(".00", ""))
    figure.suptitle(f"{title}: the mean of the workers' models on text that none has seen")
    figure.savefig(path, dpi=70)
