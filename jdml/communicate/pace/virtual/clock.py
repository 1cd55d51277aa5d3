"""Virtual seconds: a type and a name of their own, so that nobody takes them for wall time."""

from typing import NewType

VirtualSeconds = NewType("VirtualSeconds", float)
"""Seconds that a simulation says have passed. No wall clock ever makes one."""


class VirtualClock:
    """The ``now`` of a server in virtual time; only the simulation moves it."""

    def __init__(self) -> None:
        self.virtual_seconds = VirtualSeconds(0.0)

    def __call__(self) -> VirtualSeconds:
        return self.virtual_seconds
