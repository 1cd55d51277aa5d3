"""What a method's file holds, and what follows from all: times to the loss, gaps, targets."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

TORCH = "torch "
EXACT = "exact"
DDP = "torch f32"
NEAR_EXACT = 0.01
"""How much more loss than the exact exchange's a method of the targets may end with."""


@dataclass
class Phase:
    """Steps of one kind over links of one rate.

    Attributes:
      first: Number of the step from which a method's steps are of this kind.
      seconds: Of each step timed, from the slowest worker's end to the next.
      sent_bytes: Per step and worker, the worker that sent most; framing and metrics included.
    """

    first: int
    seconds: list[float]
    sent_bytes: float


@dataclass
class AtRate:
    """A method over links of one rate.

    Attributes:
      phases: One, or more where a method changes what it sends on the way.
      losses: Training loss of each step, from the first.
      validation: ``(steps, loss)``, where the whole run went over these links (``--full``).
    """

    phases: list[Phase]
    losses: list[float]
    validation: list[tuple[int, float]] = field(default_factory=list)

    @property
    def step_seconds(self) -> float:
        """Of a step of the last phase."""
        return statistics.median(self.phases[-1].seconds)

    @property
    def sent_bytes(self) -> float:
        """Of a step of the last phase."""
        return self.phases[-1].sent_bytes

    def seconds_of(self, steps: float) -> float:
        """So many steps from the first, each phase's at their median."""
        total, end = 0.0, steps
        for phase in reversed(self.phases):
            total += max(0.0, end - phase.first) * statistics.median(phase.seconds)
            end = min(end, float(phase.first))
        return total


@dataclass
class Result:
    """One method: a whole run over unshaped links, and its steps over each rate.

    Attributes:
      name: ``"torch ..."`` is PyTorch's.
      task: Fingerprint of the task.
      losses: Training loss of each step, mean over the workers.
      validation: ``(steps, loss)``.
      alone: Seconds of the step without its exchange.
      rates: By megabits per second.
    """

    name: str
    task: str
    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    rates: dict[str, AtRate] = field(default_factory=dict)

    @property
    def compute_seconds(self) -> float:
        return statistics.median(self.alone)

    @property
    def final_loss(self) -> float:
        return self.validation[-1][1]

    def exchange_seconds(self, rate: str) -> float:
        """What the exchange adds to a step: encoding and decoding included, overlap taken off."""
        return self.rates[rate].step_seconds - self.compute_seconds

    def exchange_until(self, target: float, rate: str) -> float | None:
        """Seconds that exchanges add until the target is reached."""
        steps = self.steps_to(target)
        if steps is None:
            return None
        return self.rates[rate].seconds_of(steps) - steps * self.compute_seconds

    def steps_to(self, target: float) -> float | None:
        """Steps to a validation loss, between two validations in proportion; None: not reached."""
        before = None
        for step, loss in self.validation:
            if loss <= target:
                if before is None or before[1] == loss:
                    return float(step)
                done = (before[1] - target) / (before[1] - loss)
                return before[0] + done * (step - before[0])
            before = (step, loss)
        return None

    def seconds_to(self, target: float, rate: str) -> float | None:
        """``steps_to(target)`` steps over these links."""
        steps = self.steps_to(target)
        return None if steps is None else self.rates[rate].seconds_of(steps)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{_file_name(self.name)}.json"
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(dataclasses.asdict(self)) + "\n")
        partial.replace(file)


def load(folder: Path, name: str, task: str) -> Result:
    """What the folder holds of a method on this task; an empty result if nothing."""
    file = folder / f"{_file_name(name)}.json"
    if file.exists():
        content = json.loads(file.read_text())
        if content["task"] == task:
            rates = {}
            for rate, at in content.pop("rates").items():
                phases = [Phase(**phase) for phase in at.pop("phases")]
                rates[rate] = AtRate(phases, **at)
            return Result(**content, rates=rates)
    return Result(name, task)


def _file_name(name: str) -> str:
    kept = (c if c.isalnum() else "-" for c in name.replace("%", "percent").replace("+", "with"))
    return "-".join(part for part in "".join(kept).split("-") if part)


@dataclass(frozen=True)
class Verdict:
    """A target, what was measured, and whether that meets it."""

    text: str
    met: bool

    def __str__(self) -> str:
        return f"{self.text}: {'met' if self.met else 'MISSED'}"


def best(
    results: Mapping[str, Result], names: Sequence[str], target: float, rate: str
) -> Result | None:
    """Of these methods the one that reaches the target first."""
    reached = [
        (seconds, name)
        for name in names
        if (seconds := results[name].seconds_to(target, rate)) is not None
    ]
    return results[min(reached)[1]] if reached else None


def verdicts(results: Mapping[str, Result], target: float, slowest: str) -> list[Verdict]:
    """The benchmark's targets, as far as what they need was measured; ``slowest``: a rate.

    They are of the method that reaches the loss first among those that end within 1 % of the exact
    exchange's validation loss; what the others end with stands in the table.
    """
    ours = [name for name in results if not name.startswith(TORCH) and name != EXACT]
    hooks = [name for name in results if name.startswith(TORCH) and name != DDP]
    gaps = {}
    if EXACT in results:
        gaps = {n: results[n].final_loss / results[EXACT].final_loss - 1 for n in ours}
        ours = [n for n in ours if gaps[n] <= NEAR_EXACT]
        if gaps and not ours:
            near = min(gaps, key=gaps.__getitem__)
            text = f"final validation loss nearest to exact: {near}, {100 * gaps[near]:+.2f} %"
            return [Verdict(f"{text} (target {100 * NEAR_EXACT:g} %)", False)]
    first = best(results, ours, target, slowest)
    if first is None:
        return []
    lines = []
    if first.name in gaps:
        text = f"final validation loss of {first.name}: {100 * gaps[first.name]:+.2f} % of exact"
        lines.append(Verdict(f"{text} (target {100 * NEAR_EXACT:g} %)", True))
    base = results[DDP].seconds_to(target, slowest) if DDP in results else None
    if base and (seconds := first.seconds_to(target, slowest)):
        text = (
            f"{slowest} Mbit/s, whole time to {target:g}: {first.name} {seconds:.0f} s, "
            f"DDP f32 {base:.0f} s, {base / seconds:.1f} times faster (target 3)"
        )
        lines.append(Verdict(text, base / seconds >= 3))
    for rate in first.rates:
        spent = {n: results[n].exchange_until(target, rate) for n in (*ours, *hooks)}
        mine = {n: s for n in ours if (s := spent[n]) is not None}
        theirs = {n: s for n in hooks if (s := spent[n]) is not None}
        if mine and theirs:
            one, other = min(mine, key=mine.__getitem__), min(theirs, key=theirs.__getitem__)
            text = (
                f"{rate} Mbit/s, exchange alone until {target:g}: {one} {mine[one]:.1f} s, "
                f"DDP's best hook ({other.removeprefix(TORCH)}) {theirs[other]:.1f} s"
            )
            lines.append(Verdict(text, mine[one] <= theirs[other]))
    return lines
