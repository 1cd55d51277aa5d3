"""Options of the backup workers experiment, and their defaults: about a minute on two CPU cores."""

import dataclasses
from pathlib import Path

from jdml.models import ConvNetConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains on digits without the latest b gradients of each step; time is simulated."""

    out: Path = Path("runs/backup_workers")
    """Folder for the metrics, the summary and the picture."""

    workers: int = 16
    """Workers, each on a (simulated) device of its own; of N, the first N - b count."""
    backups: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Numbers b to try."""
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    """Of the test images, the initial model, the order and the arrivals, all at once."""
    sigma: float = 0.5
    """Of the log-normal arrivals: standard deviation of the logarithm; their median is 1."""
    tail: float = 1.5
    """Of the heavy-tailed arrivals: P(time > t) falls as t to the minus this; their median is 1."""

    target: float = 0.25
    """Test loss to reach, nats per image."""
    steps: int = 160
    """Steps of a run."""
    eval_every: int = 5
    """Steps between evaluations; between two of them the loss is taken to be a line."""
    batch: int = 2
    """Images of one worker's step."""
    test_images: int = 360
    """Images that no worker trains on, of 1,797."""
    learning_rate: float = 0.03
    """Of SGD, the same for every b."""
    momentum: float = 0.9
    """Of SGD."""
    model: ConvNetConfig = dataclasses.field(
        default_factory=lambda: ConvNetConfig(widths=(8, 16), hidden=32)
    )
    """Shape of the network."""

    def __post_init__(self) -> None:
        for name in ("workers", "steps", "eval_every", "batch", "test_images"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}."
                )
        for name in ("backups", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is empty; give at least one.")
        if not all(0 <= b < self.workers for b in self.backups):
            raise ValueError(
                f"--backups {self.backups}: of {self.workers} workers 0 to {self.workers - 1} can "
                "be spared."
            )
