"""Options of the pace experiment, and their defaults: two minutes on two CPU cores."""

import dataclasses
from pathlib import Path
from typing import Literal

from experiments.pace.methods import method

CLOCKS = ("one slow worker", "heavy tails")
METHODS = (
    "BSP",
    "SSP s = 1",
    "SSP s = 4",
    "SSP s = 16",
    "asynchronous",
    "DC-ASGD",
    "backup b = 1",
    "backup b = 2",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains on digits at several paces; loss against time."""

    out: Path = Path("runs/pace")
    """Folder for the metrics, the summary and the picture; one per backend below it."""
    backend: Literal["virtual", "threads", "ray"] = "virtual"
    """Simulated time; or wall time, with a thread or a process for each worker."""
    methods: tuple[str, ...] = METHODS
    """Which to try; the first is what the others are compared with. Any s and any b will do."""
    clocks: tuple[str, ...] = CLOCKS
    """Which models of the workers' delays."""
    workers: int | None = None
    """Workers; by default 32 in virtual time, 4 in wall time."""
    seeds: tuple[int, ...] = (0, 1)
    """Of the initial model, the order of the samples and the delays; in wall time, the first."""

    seconds: float | None = None
    """Length of a run: virtual seconds (default 240), or wall seconds (default 5)."""
    step_wall_seconds: float = 0.02
    """In wall time: a worker sleeps for its delay times this in every step, besides computing."""
    slowdown: float = 4.0
    """Of worker 0, whose delays are otherwise 1 like everybody's."""
    sigma: float = 0.1
    """Deviation of the logarithm of the delays around one slow worker."""
    tail: float = 2.0
    """Of the heavy-tailed delays: P(delay > t) falls as t to the minus this; their median is 1."""

    target: float = 0.7
    """Training loss to reach, nats per image."""
    evaluations: int = 120
    """Evaluations of a run; between two of them the loss is taken to be a line."""
    batch: int = 8
    """Images of one worker's step."""
    hidden: int = 32
    """Units of the network's hidden layer."""
    learning_rate: float = 0.4
    """Of a clock: what all workers' updates of one clock move the model by, for every method."""
    compensation: float = 0.04
    """DC-ASGD's λ."""

    def __post_init__(self) -> None:
        for name in ("methods", "clocks", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is empty; give at least one.")
        for name in self.methods:
            method(name, 1, self.learning_rate)
        for clock in self.clocks:
            if clock not in CLOCKS:
                raise ValueError(f"--clocks {clock!r} is not one of {CLOCKS}.")
        if self.num_workers < 3:
            raise ValueError(f"--workers must be at least 3, got {self.num_workers}.")
        for name in ("length", "step_wall_seconds", "slowdown", "target", "evaluations"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"--{name.replace('_', '-')} must be greater than 0, got {getattr(self, name)}."
                )

    @property
    def num_workers(self) -> int:
        return self.workers or (32 if self.backend == "virtual" else 4)

    @property
    def length(self) -> float:
        """Of a run, in the seconds of its backend."""
        return self.seconds or (240.0 if self.backend == "virtual" else 5.0)

    @property
    def unit(self) -> str:
        """What the time of this backend is."""
        return "virtual seconds" if self.backend == "virtual" else "wall seconds"
