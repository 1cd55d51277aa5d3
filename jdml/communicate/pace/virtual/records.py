"""What a simulation says."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from jdml.communicate.pace.virtual.clock import VirtualSeconds


class Event(NamedTuple):
    """One line of a trace."""

    virtual_seconds: VirtualSeconds
    worker: int
    what: str
    number: int


class Evaluation(NamedTuple):
    """A value of the run, at a moment of it."""

    virtual_seconds: VirtualSeconds
    version: int
    value: Any


@dataclasses.dataclass(frozen=True)
class VirtualRun:
    """What a simulation says.

    Attributes:
      virtual_seconds: Its length.
      num_events: Events that happened: computations, pushes that came, pulls that were answered.
      evaluations: What ``evaluate`` returned, in order.
      computing_virtual_seconds: Per worker, time spent on local steps.
      waiting_virtual_seconds: Per worker, time in which the server kept a pull waiting.
      refused: Pushes answered ``accepted=False``.
      trace: Every event, if asked for.
    """

    virtual_seconds: VirtualSeconds
    num_events: int
    evaluations: list[Evaluation]
    computing_virtual_seconds: np.ndarray
    waiting_virtual_seconds: np.ndarray
    refused: int
    trace: list[Event]
