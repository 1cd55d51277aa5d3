"""Options of the ADMM experiment, and their defaults: one or two minutes on two CPU cores."""

import dataclasses
from pathlib import Path
from typing import Any

from jdml.models import ConvNetConfig

VARIANTS: dict[str, dict[str, Any]] = {
    "rho 0.1": {"rho": 0.1},
    "rho 1": {"rho": 1.0},
    "rho 10": {"rho": 10.0},
    "rho 1, over-relaxed 1.6": {"rho": 1.0, "over_relaxation": 1.6},
    "rho 0.1, adaptive": {"rho": 0.1, "adaptive": True},
    "rho 10, adaptive": {"rho": 10.0, "adaptive": True},
    "rho 10, adaptive, over-relaxed 1.6": {"rho": 10.0, "adaptive": True, "over_relaxation": 1.6},
}
"""Options of ``consensus_admm`` that the convex problems are solved with."""


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """The network and how it is trained, by each of the three methods."""

    rounds: int = 50
    """Exchanges."""
    local_steps: int = 16
    """Steps between two exchanges of ADMM and of averaging; synchronous SGD takes one."""
    rho: float = 0.3
    """ADMM's penalty."""
    alpha: float = 0.3
    """Concentration of each digit's shares among the workers; small gives a digit to few."""
    batch: int = 16
    """Images of one worker's step."""
    learning_rate: float = 0.03
    """Of SGD."""
    momentum: float = 0.9
    """Of SGD; each worker keeps its own where the workers have models of their own."""
    test_images: int = 360
    """Images that no worker trains on, of 1,797."""
    model: ConvNetConfig = dataclasses.field(
        default_factory=lambda: ConvNetConfig(widths=(8, 16), hidden=32)
    )
    """Shape of the network."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Fits two convex models and a network by consensus ADMM."""

    out: Path = Path("runs/admm")
    """Folder for the metrics, the summary and the pictures."""
    workers: int = 8
    """Workers, each on a (simulated) device of its own."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Runs of the network; the first also divides the samples of the convex problems."""

    variants: tuple[str, ...] = tuple(VARIANTS)
    """Which ways to solve the convex problems."""
    rounds: int = 100
    """Exchanges of a convex problem."""
    local_steps: int = 30
    """Steps of L-BFGS between two of them."""
    ridge: float = 1.0
    """Strength of the squared penalty of the logistic regression, beside sum_k f_k."""
    sparsity: float = 0.05
    """Strength of the lasso's penalty, beside the mean of the f_k (scikit-learn's alpha)."""
    network: NetworkConfig = dataclasses.field(default_factory=NetworkConfig)
    """The network's own options."""

    def __post_init__(self) -> None:
        for name in ("workers", "rounds", "local_steps"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}."
                )
        for name in ("rounds", "local_steps"):
            if getattr(self.network, name) < 1:
                raise ValueError(
                    f"--network.{name.replace('_', '-')} must be at least 1, got "
                    f"{getattr(self.network, name)}."
                )
        for name in ("seeds", "variants"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is empty; give at least one.")
        for variant in self.variants:
            if variant not in VARIANTS:
                raise ValueError(f"--variants {variant!r} is not one of {tuple(VARIANTS)}.")
