"""Options of the experiment on linear models, and their defaults: some minutes on two CPU cores."""

import dataclasses
from pathlib import Path

from experiments.linear.data import DATA
from experiments.linear.methods import DIVISIONS, METHODS


@dataclasses.dataclass(frozen=True)
class Config:
    """Fits two logistic regressions by every method, divided by sample, by feature and by both."""

    out: Path = Path("runs/linear")
    """Folder for the metrics, the summary and the picture."""
    data: tuple[str, ...] = tuple(DATA)
    """Which data sets."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Which methods."""
    divisions: tuple[str, ...] = DIVISIONS
    """Which ways to divide."""

    workers: int = 8
    """Workers, simulated; a number with two factors for a division both ways."""
    accuracy: float = 1e-6
    """Distance from the least objective at which a method is done, relative to it."""
    max_rounds: int = 4000
    """Rounds after which a method is given up."""
    max_seconds: float = 10.0
    """Seconds of computing after which it is given up."""
    shrink: int = 1
    """Take one sample of so many, for a quick look."""

    def __post_init__(self) -> None:
        for name, known in (("data", DATA), ("methods", METHODS), ("divisions", DIVISIONS)):
            chosen = getattr(self, name)
            if not chosen:
                raise ValueError(f"--{name} is empty; give at least one.")
            for one in chosen:
                if one not in known:
                    raise ValueError(f"--{name} {one!r} is none of {', '.join(known)}.")
        if self.workers < 2:
            raise ValueError(f"--workers must be at least 2, got {self.workers}.")
        for name in ("accuracy", "max_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"--{name.replace('_', '-')} must be above 0, got {getattr(self, name)}."
                )
        for name in ("max_rounds", "shrink"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}."
                )
