"""Options of the ensemble experiment, and their defaults: about a minute on two CPU cores."""

import dataclasses
from pathlib import Path

from jdml.models import ConvNetConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains by averaging parameters and by EC-DNN, on digits that the workers share unevenly."""

    out: Path = Path("runs/ensemble")
    """Folder for the metrics, the summary and the picture."""

    workers: int = 8
    """Workers, each on a (simulated) device of its own."""
    alphas: tuple[float, ...] = (1.0, 0.3)
    """Skews to try: concentration of each digit's shares; small gives a digit to few workers."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the test images, the division, the initial model and the order, all at once."""
    test_images: int = 360
    """Images that no worker trains on, of 1,797."""

    rounds: int = 10
    """Exchanges."""
    local_steps: int = 32
    """Steps before an exchange."""
    distill_steps: int = 64
    """Steps after it, towards what the ensemble said; averaging takes as many on its own labels."""
    num_batches: int = 8
    """Batches that the ensemble relabels in a round."""
    weight: float = 1.0
    """Of what the ensemble said, beside the labels."""
    batch: int = 16
    """Images of one worker's step."""
    learning_rate: float = 0.03
    """Of SGD."""
    momentum: float = 0.9
    """Of SGD; each worker keeps its own."""
    model: ConvNetConfig = dataclasses.field(default_factory=ConvNetConfig)
    """Shape of the network."""

    def __post_init__(self) -> None:
        for name in ("workers", "test_images", "rounds", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}."
                )
        for name in ("alphas", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is empty; give at least one.")

    @property
    def steps_per_round(self) -> int:
        """Optimiser steps from one exchange to the next, of either method."""
        return self.local_steps + self.distill_steps
