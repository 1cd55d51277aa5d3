"""Options of the asynchronous ADMM experiment, and their defaults: a minute on two CPU cores."""

import dataclasses
from pathlib import Path

CLOCKS = ("even", "one slow worker", "heavy tails")


@dataclasses.dataclass(frozen=True)
class Config:
    """Logistic regression by consensus ADMM that does not wait for all; time is simulated."""

    out: Path = Path("runs/async_admm")
    """Folder for the metrics, the summary and the picture."""

    workers: int = 16
    """Workers, N, each with as many of the samples."""
    barriers: tuple[tuple[int, int], ...] = ((16, 1), (12, 2), (8, 2), (8, 8), (4, 8), (1, 16))
    """``S τ``: how many reports a round waits for, and for how many rounds one may be used."""
    clocks: tuple[str, ...] = CLOCKS
    """Which models of the workers' times."""
    seeds: tuple[int, ...] = (0, 1)
    """Of the division of the samples and of the times."""
    slowdown: float = 4.0
    """Of worker 0, where one is slow."""
    sigma: float = 0.1
    """Deviation of the logarithm of the times, except where their tail is heavy."""
    tail: float = 2.0
    """Of the heavy-tailed times: P(time > t) falls as t to the minus this; their median is 1."""

    rho: float = 0.1
    """Penalty."""
    ridge: float = 1.0
    """Strength of the squared penalty on the weights, beside sum_k f_k."""
    solver_steps: int = 12
    """Steps of L-BFGS with which a worker minimises its part in a round."""
    virtual_seconds: float = 180.0
    """Length of a run; the unit is the median time of one minimisation."""
    target: float = 1e-6
    """Relative difference of the objective from the central solver's that is to be reached."""

    def __post_init__(self) -> None:
        for name in ("barriers", "clocks", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is empty; give at least one.")
        for clock in self.clocks:
            if clock not in CLOCKS:
                raise ValueError(f"--clocks {clock!r} is not one of {CLOCKS}.")
        for barrier in self.barriers:
            if not (1 <= barrier[0] <= self.workers and barrier[1] >= 1):
                raise ValueError(
                    f"--barriers {barrier}: expected 1 <= S <= {self.workers} and τ >= 1."
                )
        for name in ("workers", "solver_steps", "virtual_seconds", "target"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"--{name.replace('_', '-')} must be greater than 0, got {getattr(self, name)}."
                )
