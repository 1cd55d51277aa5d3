"""Options of the gossip experiment, and their defaults: about two minutes on two CPU cores."""

import dataclasses
from pathlib import Path

from jdml.models import ConvNetConfig

GRAPHS = (
    "ring",
    "torus",
    "exponential",
    "one-peer exponential",
    "random pairs",
    "complete",
)


@dataclasses.dataclass(frozen=True)
class AveragingConfig:
    """The linear consensus problem: every worker has a vector, all want the mean."""

    elements: int = 2000
    """Of each vector."""
    rounds: int = 240
    """Exchanges over each graph."""
    compressed_rounds: int = 4000
    """Exchanges of what top-k keeps; int8 takes as many as exact values."""
    kept: float = 0.01
    """Part of the elements that top-k sends."""
    gamma: float = 0.04
    """CHOCO's step size."""


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """A small network on digits that the workers share unevenly."""

    steps: int = 300
    """Steps of each worker, and rounds of mixing; a multiple of eval_every."""
    eval_every: int = 30
    """Steps between measurements on the test images: those of one call."""
    alpha: float = 0.3
    """Concentration of each digit's shares among the workers; small gives a digit to few."""
    batch: int = 16
    """Images of one worker's step."""
    learning_rate: float = 0.1
    """Of SGD, without momentum."""
    gamma: float = 0.04
    """CHOCO's step size."""
    test_images: int = 360
    """Images that no worker trains on, of 1,797."""
    model: ConvNetConfig = dataclasses.field(
        default_factory=lambda: ConvNetConfig(widths=(8, 16), hidden=32)
    )
    """Shape of the network."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Averages, and trains, over six graphs and with compressed differences."""

    out: Path = Path("runs/gossip")
    """Folder for the metrics, the summary and the pictures."""
    workers: int = 16
    """Workers, each on a (simulated) device of its own; a product of two numbers over 1."""
    graphs: tuple[str, ...] = GRAPHS
    """Which graphs to average and train over; what is compressed goes over the ring in any case."""
    seeds: tuple[int, ...] = (0, 1)
    """Runs of the training; the first also draws the random pairs and the vectors."""
    pairs: int = 16
    """Rounds of random pairs that are drawn, and repeat."""
    averaging: AveragingConfig = dataclasses.field(default_factory=AveragingConfig)
    """Of pure averaging."""
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    """Of the network."""

    def __post_init__(self) -> None:
        for name, value, least in (
            ("averaging.rounds", self.averaging.rounds, 1),
            ("averaging.compressed-rounds", self.averaging.compressed_rounds, 1),
            ("training.steps", self.training.steps, 1),
            ("training.eval-every", self.training.eval_every, 2),
        ):
            if value < least:
                raise ValueError(f"--{name} must be at least {least}, got {value}.")
        if self.training.steps % self.training.eval_every:
            raise ValueError(
                f"--training.steps {self.training.steps} is no multiple of --training.eval-every "
                f"{self.training.eval_every}; the last steps would not be measured."
            )
        if not self.seeds:
            raise ValueError("--seeds is empty; give at least one.")
        for graph in self.graphs:
            if graph not in GRAPHS:
                raise ValueError(f"--graphs {graph!r} is not one of {GRAPHS}.")
        if self.rows == 1:
            raise ValueError(
                f"--workers {self.workers} make no torus; give a product of two numbers over 1."
            )

    @property
    def rows(self) -> int:
        """Of the torus, as near to square as can be."""
        n = self.workers
        return max((r for r in range(1, n + 1) if n % r == 0 and r * r <= n), default=1)
