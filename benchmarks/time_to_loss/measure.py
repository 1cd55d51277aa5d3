"""A program's processes over links of each rate: what they are asked, and in which order."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.crew import Crew
from benchmarks.namespaces import LinkedWorker, shape
from benchmarks.time_to_loss.problem import ONE_BIT_ADAM, Task, one_bit_warm_up
from benchmarks.time_to_loss.results import TORCH, AtRate, Phase, Result

PORT = 29500  # inside a namespace of our own, so that it is always free
WARM_UP = 3  # steps before timed ones; DDP's PowerSGD hook sends the first two exactly
Progress = Callable[[str, int], None]
"""Told what is being done, and how many steps or timings are done since."""


def phase_starts(name: str, steps: int) -> list[int]:
    """Numbers of the steps at which a method changes what it sends, in a run of so many."""
    return [0, one_bit_warm_up(steps)] if name == ONE_BIT_ADAM else [0]


def crew_commands(
    workers: Sequence[LinkedWorker], task: Task, problem: Path, theirs: bool
) -> list[list[str]]:
    """How each process of a program is started."""
    module = f"benchmarks.time_to_loss.worker_{'torch' if theirs else 'jdml'}"
    script = [sys.executable, "-m", module]
    script += ["--coordinator", f"{workers[0].address}:{PORT + theirs}"]
    script += ["--problem", str(problem.resolve())]
    script += ["--shape", json.dumps(dataclasses.asdict(task.shape))]
    script += ["--num-workers", str(len(workers))]
    return [w.command(*script, "--worker", str(i)) for i, w in enumerate(workers)]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be measured of every method."""

    task: Task
    rates: tuple[float, ...]
    timed_steps: int
    full: bool
    out: Path

    def check(self, name: str) -> None:
        """Raises unless every kind of step of this method comes often enough to be timed."""
        steps, wanted = self.task.steps, WARM_UP + self.timed_steps
        starts = phase_starts(name, steps)
        for first, end in itertools.pairwise([*starts, steps]):
            if end - first < wanted:
                raise ValueError(
                    f"{name}: {wanted} steps from number {first} on are to be taken, {WARM_UP} of "
                    f"them before those timed, but the run has {end - first} there; raise "
                    "--task.steps or lower --timed-steps."
                )

    def is_complete(self, result: Result) -> bool:
        """Whether nothing is left to measure."""
        whole = len(result.losses) == self.task.steps and bool(result.alone)
        return whole and all(self.is_timed(result, rate) for rate in self.rates)

    def is_timed(self, result: Result, rate: float) -> bool:
        """Whether nothing is left to measure over this rate."""
        at = result.rates.get(f"{rate:g}")
        return at is not None and bool(at.validation or not self.full)


class Run:
    """One program's processes, and what is asked of them."""

    def __init__(self, plan: Plan, workers: Sequence[LinkedWorker], crew: Crew) -> None:
        self.plan = plan
        self.workers = workers
        self.crew = crew

    def gradient(self, path: Path) -> float:
        """Has the first worker write the first mean gradient; returns the loss."""
        return self.crew.ask("gradient", path=str(path.resolve()))[0]

    def train(self, result: Result, progress: Progress) -> None:
        """Trains to the end, unless that was done, and saves the result."""
        if len(result.losses) == self.plan.task.steps:
            progress("", self.plan.task.steps)
            return
        shape(self.workers, None)
        progress(f"{result.name}: training", 0)
        name = result.name.removeprefix(TORCH)
        result.losses, result.validation, _, _ = self._whole(name, progress)
        result.save(self.plan.out)

    def time(self, result: Result, progress: Progress) -> None:
        """Times what of a trained result was not timed, and saves it after each part."""
        out = self.plan.out
        if not result.alone:
            progress(f"{result.name}: the step alone", 0)
            shape(self.workers, None)
            self.crew.ask("start", name="alone")
            self._train(WARM_UP)
            result.alone = self._train(self.plan.timed_steps)[0]
            result.save(out)
        for rate in self.plan.rates:
            if self.plan.is_timed(result, rate):
                progress("", 0 if self.plan.full else 1)
                continue
            progress(f"{result.name}: {rate:g} Mbit/s", 0)
            name = result.name.removeprefix(TORCH)
            result.rates[f"{rate:g}"] = self._over(name, rate, result, progress)
            result.save(out)

    def _over(self, name: str, rate: float, result: Result, progress: Progress) -> AtRate:
        if self.plan.full:
            shape(self.workers, rate)
            losses, validation, seconds, sent = self._whole(name, progress)
            starts = [*phase_starts(name, len(losses)), len(losses)]
            phases = [
                Phase(first, seconds[first + WARM_UP : end], sent)
                for first, end in itertools.pairwise(starts)
            ]
            at = AtRate(phases, losses, validation)
        else:
            self.crew.ask("start", name=name)
            at = AtRate([], [])
            for first in phase_starts(name, self.plan.task.steps):
                if first > len(at.losses):  # there, without waiting for the links
                    shape(self.workers, None)
                    at.losses += self._train(first - len(at.losses))[1]
                shape(self.workers, rate)
                at.losses += self._train(WARM_UP)[1]
                seconds, losses, sent = self._train(self.plan.timed_steps)
                at.losses += losses
                at.phases.append(Phase(first, seconds, sent))
            progress("", 1)
        if at.losses != result.losses[: len(at.losses)]:
            raise RuntimeError(
                f"{result.name}: losses over shaped links differ from those over unshaped ones, "
                f"{at.losses[:5]} … and {result.losses[:5]} …; times of one run would not be the "
                "other's. --full trains over each link."
            )
        return at

    def _whole(self, name: str, progress: Progress) -> Any:
        """A run from the first step to the last: losses, validation, seconds, bytes per step."""
        wanted = self.plan.task
        self.crew.ask("start", name=name)
        losses: list[float] = []
        seconds: list[float] = []
        validation, sent = [(0, self.crew.ask("validate")[0])], []
        while len(losses) < wanted.steps:
            steps = min(wanted.eval_every, wanted.steps - len(losses))
            more_seconds, more, bytes_per_step = self._train(steps)
            seconds, losses = seconds + more_seconds, losses + more
            sent.append(bytes_per_step)
            validation.append((len(losses), self.crew.ask("validate")[0]))
            progress("", steps)
        return losses, validation, seconds, float(np.median(sent))

    def _train(self, steps: int) -> tuple[list[float], list[float], float]:
        """Seconds of each step, losses, and bytes per step of the worker that sent most."""
        answers = self.crew.ask("train", steps=steps)
        ends = np.max([answer["ends"] for answer in answers], axis=0)
        begin = max(answer["begin"] for answer in answers)
        seconds = np.diff(ends, prepend=begin).tolist()
        sent = max(answer["sent"] for answer in answers) / steps
        return seconds, answers[0]["losses"], sent
