"""What a run in wall time says."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np


class WallEvaluation(NamedTuple):
    """A value of the run, at a moment of it."""

    wall_seconds: float
    version: int
    value: Any


@dataclasses.dataclass(frozen=True)
class WallRun:
    """What a run took; measured, never simulated. Arrays are per worker, in their order.

    Attributes:
      wall_seconds: Its length, from the first local step until all workers had stopped; without
        compilation.
      evaluations: What ``evaluate`` returned, in order.
      computing_wall_seconds: Time spent on local steps, pauses included.
      waiting_wall_seconds: Time spent in pulls.
      pushing_wall_seconds: Time spent in pushes that the worker waited for.
      num_steps: Local steps taken.
      num_pushes: Pushes that were answered.
      refused: Pushes answered ``accepted=False``, of all workers.
      restarts: How often a worker was started anew after a failure, by number.
      returns: How often a worker returned after the server had evicted it, by number.
      gone: Workers that stay away, and why, by number.
    """

    wall_seconds: float
    evaluations: list[WallEvaluation]
    computing_wall_seconds: np.ndarray
    waiting_wall_seconds: np.ndarray
    pushing_wall_seconds: np.ndarray
    num_steps: np.ndarray
    num_pushes: np.ndarray
    refused: int
    restarts: dict[int, int]
    returns: dict[int, int]
    gone: dict[int, str]
