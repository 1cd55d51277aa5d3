"""Options of the scale experiment, and their defaults: two minutes on two CPU cores."""

import dataclasses
from pathlib import Path

from experiments.pace.methods import method

METHODS = ("BSP", "SSP s = 1", "SSP s = 4", "asynchronous", "backup b = 50")


@dataclasses.dataclass(frozen=True)
class Config:
    """A thousand workers in virtual time: what comes of it, and what the simulation costs."""

    out: Path = Path("runs/scale")
    """Folder for the metrics, the summary and the picture."""

    workers: tuple[int, ...] = (100, 1000)
    """Numbers of workers to measure the simulation with; the last are trained with, too."""
    methods: tuple[str, ...] = METHODS
    """Which paces to try."""
    seed: int = 0
    """Of the initial model, the samples and the times."""
    virtual_seconds: float = 40.0
    """Length of a training run; the unit is the median time of a step."""
    tail: float = 3.0
    """Of the times of a step: P(time > t) falls as t to the minus this; their median is 1."""
    latency_virtual_seconds: float = 0.01
    """Of a message, one way."""
    events: int = 60_000
    """Of a measurement without gradients and without a network."""

    evaluations: int = 40
    """Evaluations of a training run."""
    batch: int = 1
    """Images of one worker's step."""
    hidden: int = 32
    """Units of the network's hidden layer."""
    learning_rate: float = 0.4
    """Of a clock: what all workers' updates of one clock move the model by."""
    target: float = 1.0
    """Training loss to reach, nats per image."""

    def __post_init__(self) -> None:
        for name in ("workers", "methods"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is empty; give at least one.")
        if min(self.workers) < 1:
            raise ValueError(f"--workers {self.workers}: expected at least 1 each.")
        for name in self.methods:
            for count in self.workers:
                method(name, count, self.learning_rate).rule.check(count)
        for name in ("virtual_seconds", "events", "evaluations", "batch", "target"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"--{name.replace('_', '-')} must be greater than 0, got {getattr(self, name)}."
                )
