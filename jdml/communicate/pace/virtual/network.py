"""A network in virtual time: each worker's link, and the server's, which they share."""

import dataclasses
import math

import numpy as np

from jdml.communicate.cost import Link


@dataclasses.dataclass(frozen=True)
class Network:
    """How long messages travel.

    ``latency * exp(jitter n) + bytes / bandwidth`` on the worker's own link, then, in the order in
    which they were sent, ``bytes / server_bandwidth`` on the server's; each direction by itself.

    Args:
      link: Each worker's own; in virtual seconds, and bytes per virtual second.
      server_bandwidth: Bytes per virtual second that the server takes in, and sends, in all.
      jitter: Sigma >= 0 of the log-normal that the latency is multiplied by. With it a message may
        overtake another one.
      duplicated: Probability that a push comes twice, each copy at a time of its own.
    """

    link: Link
    server_bandwidth: float = math.inf
    jitter: float = 0.0
    duplicated: float = 0.0

    def __post_init__(self) -> None:
        if not (self.server_bandwidth > 0 and self.jitter >= 0 and 0 <= self.duplicated < 1):
            raise ValueError(
                f"{self}: expected server_bandwidth > 0, jitter >= 0 and 0 <= duplicated < 1."
            )


class Traveller:
    """A network at work: what the server's link is busy with, and the draws."""

    def __init__(self, network: Network, seed: int) -> None:
        self._network = network
        self._draws = np.random.default_rng([seed, 0x4E7])
        self._free = {"up": 0.0, "down": 0.0}

    def arrival(self, direction: str, now: float, nbytes: int) -> float:
        """When a message that is sent now has come as a whole."""
        network, latency = self._network, self._network.link.latency
        if network.jitter:
            latency *= math.exp(network.jitter * self._draws.standard_normal())
        there = now + latency + nbytes / network.link.bandwidth
        if nbytes and network.server_bandwidth < math.inf:
            there = max(there, self._free[direction]) + nbytes / network.server_bandwidth
            self._free[direction] = there
        return there

    def comes_twice(self) -> bool:
        return bool(self._network.duplicated and self._draws.random() < self._network.duplicated)
