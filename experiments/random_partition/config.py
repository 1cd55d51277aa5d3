"""Options of the random-partition experiment, and their defaults: minutes on two CPU cores."""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Config:
    """Divides a network over workers by layer, by tensor and at random, on digits."""

    out: Path = Path("runs/random_partition")
    """Folder for the metrics, the summary and the picture."""
    workers: int = 4
    """Workers, each on a (simulated) device of its own."""
    seeds: tuple[int, ...] = (0, 1)
    """Of the test images, the initial network, the order and the draws."""
    test_images: int = 360
    """Images that no worker trains on, of 1,797."""

    width: int = 256
    """Units of every hidden layer; the workers divide it."""
    blocks: int = 4
    """Hidden layers after the first; the workers divide their number, for the pipeline."""
    backbones: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Shares of each hidden layer that all workers have; with 1 it is local SGD."""

    steps: int = 600
    """Optimiser steps; a multiple of ``local_steps``."""
    local_steps: int = 10
    """Steps on a subnet before units are dealt out again."""
    batch: int = 64
    """Images of a step: of all devices together by layer and by tensor; at random, of each."""
    learning_rates: tuple[float, ...] = (0.003, 0.01, 0.03)
    """Of SGD; each division is shown at its best."""
    momentum: float = 0.9
    """Of SGD; starts anew with every subnet."""

    def __post_init__(self) -> None:
        for name in ("workers", "test_images", "width", "blocks", "local_steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}."
                )
        if (
            not self.seeds
            or not self.learning_rates
            or self.steps < 1
            or self.steps % self.local_steps
        ):
            raise ValueError(
                f"--steps {self.steps} --local-steps {self.local_steps} --seeds {self.seeds}: "
                "expected whole rounds, a seed, and a learning rate."
            )
        for name in ("width", "blocks"):
            if getattr(self, name) % self.workers:
                raise ValueError(
                    f"--{name} {getattr(self, name)} is divided over {self.workers} workers: "
                    f"expected a multiple of {self.workers}."
                )
