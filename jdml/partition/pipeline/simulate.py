"""What a schedule costs, before anything runs: its timeline, bubble, and activations held."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Group
from rich.table import Table
from rich.text import Text

from jdml.partition.pipeline.schedule import Kind, Op, Placed, Schedule, in_flight, place

_STYLES: dict[Kind, str] = {"F": "black on cyan", "B": "black on green", "W": "black on yellow"}


@dataclass(frozen=True)
class Timeline:
    """When each stage does what; rich prints it, :func:`jdml.partition.pipeline.draw` draws it.

    Attributes:
      name: The schedule's.
      stages: ``[stage][i]``, the operations with start and end, in order.
      peak_activations: Most chunk activations that each stage holds at once: from F to B, or to W
        where the schedule splits the backward pass.
      chunks: Parts of a stage; a chunk's activation is that part of a stage's.
    """

    name: str
    stages: tuple[tuple[Placed, ...], ...]
    peak_activations: tuple[int, ...]
    chunks: int

    @property
    def span(self) -> float:
        """From the first operation's start to the last one's end."""
        return max(row[-1].end for row in self.stages)

    @property
    def busy(self) -> tuple[float, ...]:
        """How long each stage works."""
        return tuple(sum(p.end - p.start for p in row) for row in self.stages)

    @property
    def bubble(self) -> float:
        """The share of the stages' time in which they wait, 0 to 1."""
        return 1 - sum(self.busy) / (len(self.stages) * self.span)

    def __str__(self) -> str:
        """As text: a line for each stage, ``F3`` for the forward pass of micro-batch 3."""
        return "\n".join(line.plain.rstrip() for line in self._lines(96))

    def __rich__(self) -> Group:
        table = Table(box=None, pad_edge=False)
        for name in ("stage", "busy", "activations"):
            table.add_column(name, justify="right")
        for stage, (busy, peak) in enumerate(zip(self.busy, self.peak_activations, strict=True)):
            held = str(peak) if self.chunks == 1 else f"{peak} / {self.chunks}"
            table.add_row(str(stage), f"{busy / self.span:.1%}", held)
        title = Text(f"{self.name}: {self.span:g} in all, bubble {self.bubble:.1%}", style="bold")
        return Group(title, *self._lines(96), table)

    def _lines(self, most: int) -> list[Text]:
        """Each operation as wide as it is long, if ``most`` columns are enough for its number."""
        shortest = min(p.end - p.start for row in self.stages for p in row)
        longest = max(len(_label(p.op)) for row in self.stages for p in row)
        scale = longest / shortest
        labelled = self.span * scale <= most
        if not labelled:
            scale = min(1 / shortest, most / self.span)
        lines = []
        for row in self.stages:
            line = Text()
            for p in row:
                start, end = round(p.start * scale), round(p.end * scale)
                line.append("·" * (start - len(line)))
                text = _label(p.op).ljust(end - start) if labelled else p.op.kind * (end - start)
                line.append(text, style=_STYLES[p.op.kind])
            lines.append(line)
        return lines


def simulate(
    schedule: Schedule,
    num_stages: int,
    micro_batches: int,
    *,
    t_f: float = 1.0,
    t_b: float = 1.0,
    t_w: float = 1.0,
    transfer: float = 0.0,
    layers: Sequence[int] | None = None,
    lockstep: bool = False,
) -> Timeline:
    """The timeline of one training step.

    Args:
      schedule: As :func:`jdml.partition.pipeline.pipeline` takes it.
      num_stages: S.
      micro_batches: M.
      t_f: Time of an average stage's forward pass of one micro-batch; any unit.
      t_b: Of its input's gradient.
      t_w: Of its parameters' gradient; an unsplit backward pass takes ``t_b + t_w``.
      transfer: Time until a neighbour has what an operation made.
      layers: Layers of each part in the model's order, to which their times are proportional; None
        takes them all alike.
      lockstep: Time it tick by tick, each as long as its longest operation and a transfer: what the
        compiled program does, in which a stage meets its neighbours in every tick. Without, each
        stage goes on as soon as it has what it needs.

    Raises:
      ValueError: a schedule that cannot run so many micro-batches; a time that is not positive.
    """
    if min(t_f, t_b, t_w) <= 0 or transfer < 0:
        raise ValueError(
            f"simulate: t_f={t_f}, t_b={t_b}, t_w={t_w}, transfer={transfer}; expected times over "
            "0 and a transfer of at least 0."
        )
    parts = num_stages * schedule.chunks
    if layers is not None and len(layers) != parts:
        raise ValueError(
            f"simulate: layers={tuple(layers)}; expected the layers of each of {parts} parts "
            f"({num_stages} stages × {schedule.chunks} chunks)."
        )
    orders = schedule.orders(num_stages, micro_batches)
    times: dict[Kind, float] = {
        "F": t_f,
        "B": t_b if schedule.splits_backward else t_b + t_w,
        "W": t_w,
    }

    def duration(stage: int, op: Op) -> float:
        share = 1.0
        if layers is not None:
            share = layers[op.chunk * num_stages + stage] * parts / sum(layers)
        return times[op.kind] * share / schedule.chunks

    if lockstep:
        stages = _in_lockstep(place(orders, lambda stage, op: 1.0), duration, transfer)
    else:
        stages = place(orders, duration, transfer)
    freed_by: Kind = "W" if schedule.splits_backward else "B"
    return Timeline(
        schedule.name,
        tuple(tuple(row) for row in stages),
        tuple(in_flight(order, freed_by) for order in orders),
        schedule.chunks,
    )


def _in_lockstep(
    ticks: list[list[Placed]], duration: Callable[[int, Op], float], transfer: float
) -> list[list[Placed]]:
    num_ticks = int(max(row[-1].end for row in ticks))
    longest = [0.0] * num_ticks
    for stage, row in enumerate(ticks):
        for p in row:
            tick = int(p.start)
            longest[tick] = max(longest[tick], duration(stage, p.op))
    starts = [0.0]
    for length in longest:
        starts.append(starts[-1] + length + transfer)
    return [
        [Placed(p.op, starts[int(p.start)], starts[int(p.start)] + duration(s, p.op)) for p in row]
        for s, row in enumerate(ticks)
    ]


def _label(op: Op) -> str:
    return f"{op.kind}{op.micro_batch}"
