"""Delayed Nesterov: momentum that follows the mean of many late updates, not each of them."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jdml.communicate.pace.messages import Arrival
from jdml.communicate.pace.payload import Leaves
from jdml.communicate.pace.rules.arithmetic import check_rate, moved
from jdml.communicate.pace.rules.base import Apply, Book


class DelayedNesterovState(NamedTuple):
    """State of :func:`delayed_nesterov`.

    Attributes:
      num_buffered: Updates in the buffer.
      momentum: m, as of the last full buffer.
      buffer: Sum of the pseudo-gradients since then.
    """

    num_buffered: int
    momentum: Leaves
    buffer: Leaves


@dataclasses.dataclass(frozen=True)
class DelayedNesterov(Apply):
    """See :func:`delayed_nesterov`."""

    learning_rate: float
    momentum: float
    buffer_size: int
    activation: float

    def init(self, leaves: Leaves, book: Book) -> DelayedNesterovState:
        zeros = tuple(np.zeros(x.shape, np.result_type(x.dtype, np.float32)) for x in leaves)
        return DelayedNesterovState(0, zeros, zeros)

    def __call__(
        self, leaves: Leaves, state: Any, batch: Sequence[Arrival], book: Book
    ) -> tuple[Leaves, Any]:
        n, c, beta = self.buffer_size, self.activation, self.momentum
        count, m, buffer = state
        for arrival in batch:
            # The update is a descent step, the pseudo-gradient its opposite.
            gradients = [-u for u in arrival.leaves]
            count += 1
            buffer = tuple(d + g for d, g in zip(buffer, gradients, strict=True))
            share = c
            if count == n:
                m = tuple(beta * v + d / n for v, d in zip(m, buffer, strict=True))
                buffer = tuple(np.zeros_like(d) for d in buffer)
                share, count = 1 - c * n + c, 0
            leaves = tuple(
                moved(w, np.asarray(share * beta * v + g / n), -self.learning_rate)
                for w, v, g in zip(leaves, m, gradients, strict=True)
            )
        return leaves, DelayedNesterovState(count, m, buffer)


def delayed_nesterov(
    learning_rate: float, momentum: float = 0.9, buffer_size: int = 1, activation: float = 0.0
) -> DelayedNesterov:
    """The outer optimiser of asynchronous local SGD: momentum changes at every N-th update only.

    For each pseudo-gradient ``g = -u``, ``u`` a worker's move over its H local steps: ``Δ <- Δ +
    g``; at the N-th, ``m <- β m + Δ / N``, ``w <- w - lr ((1 - c N + c) β m + g / N)``, ``Δ <- 0``;
    at the others ``w <- w - lr (c β m + g / N)``. Over N updates the momentum is applied once in
    all. With N = 1 this is Nesterov's momentum, as in DiLoCo.

    Let faster workers take more local steps (:func:`local_steps_by_speed`), so that all come back
    about as often.

    Args:
      learning_rate: Outer rate, > 0.
      momentum: β, in [0, 1).
      buffer_size: N >= 1; the number of workers is usual.
      activation: c, in ``[0, 1 / N]``: how much of the momentum is applied at each update between.

    Kept at the server: two more copies of the parameters.

    Reference: Liu et al., "Asynchronous Local-SGD Training for Language Modeling", 2024, section 5
    (delayed Nesterov, dynamic local updates).
    """
    check_rate("delayed_nesterov: learning_rate", learning_rate)
    if not 0 <= momentum < 1:
        raise ValueError(f"delayed_nesterov(momentum={momentum!r}): expected 0 <= β < 1.")
    if not isinstance(buffer_size, int) or isinstance(buffer_size, bool) or buffer_size < 1:
        raise ValueError(f"delayed_nesterov(buffer_size={buffer_size!r}): expected an int >= 1.")
    if not 0 <= activation <= 1 / buffer_size:
        raise ValueError(
            f"delayed_nesterov(activation={activation!r}): expected 0 <= c <= 1 / {buffer_size}."
        )
    return DelayedNesterov(learning_rate, momentum, buffer_size, activation)


def local_steps_by_speed(seconds_per_step: Sequence[float], most: int) -> list[int]:
    """Local steps H_k of each worker: ``floor(most * fastest / seconds_k)``, at least 1.

    Args:
      seconds_per_step: Time of one local step, per worker, > 0; one unit for all.
      most: H >= 1 of the fastest worker.
    """
    if most < 1 or not all(s > 0 for s in seconds_per_step):
        raise ValueError(
            f"local_steps_by_speed({seconds_per_step}, {most}): expected times > 0, most >= 1."
        )
    fastest = min(seconds_per_step)
    return [max(1, int(most * fastest / seconds)) for seconds in seconds_per_step]
