"""Options of the aggregation experiment, and their defaults: three minutes on two CPU cores."""

import dataclasses
from pathlib import Path

from experiments.aggregation.methods import ENSEMBLES, METHODS
from jdml.models import ConvNetConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains one network by every method of jdml.aggregate, on digits shared unevenly."""

    out: Path = Path("runs/aggregation")
    """Folder for the metrics, the summary and the picture."""
    methods: tuple[str, ...] = (*METHODS, *ENSEMBLES)
    """Which to train."""

    workers: int = 8
    """Workers, each on a (simulated) device of its own."""
    alpha: float = 1.0
    """Concentration of each digit's shares among the workers; small gives a digit to few."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the test images, the division, the initial model and the order, all at once."""
    test_images: int = 360
    """Images that no worker trains on, of 1,797."""

    steps: int = 240
    """Optimiser steps of every worker, a multiple of 48."""
    batch: int = 8
    """Images of one worker's step."""
    model: ConvNetConfig = dataclasses.field(
        default_factory=lambda: ConvNetConfig(widths=(8, 16), hidden=32)
    )
    """Shape of the network."""

    def __post_init__(self) -> None:
        for name in ("workers", "test_images", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}."
                )
        if self.steps < 1 or self.steps % 48:
            raise ValueError(
                f"--steps must be a multiple of 48, the round of EC-DNN, got {self.steps}."
            )
        if not self.seeds:
            raise ValueError("--seeds is empty; give at least one.")
        for name in self.methods:
            if name not in METHODS and name not in ENSEMBLES:
                raise ValueError(
                    f"--methods {name!r} is none of {', '.join((*METHODS, *ENSEMBLES))}."
                )
