"""Proximal gradient: FISTA with restarts, or plain (ISTA)."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from jdml.optimize.base import proximal_refusal
from jdml.optimize.first_order.accelerated import Accelerated
from jdml.optimize.first_order.gradient_descent import checked_step


@dataclasses.dataclass(frozen=True)
class Proximal(Accelerated):
    momentum: bool
    whole: ClassVar[bool] = False
    name = "proximal"
    certificate = "prox-gradient norm"

    @classmethod
    def refusal(cls, problem):
        return proximal_refusal(problem)

    def step(self, problem, state):
        after = super().step(problem, state)
        if self.momentum:
            return after
        return after._replace(ahead=after.point, momentum=jnp.ones_like(after.momentum))


def proximal(
    step_size: float | None = None, momentum: bool = True, restart: bool = True
) -> Proximal:
    """``x <- prox_{ηR}(y - η ∇f(y))``, f the mean loss, R the penalty; y as in ``accelerated``.

    FISTA: ``P(x_k) - P* <= 2 L |x_0 - p*|² / (k + 1)²`` without restarts, linear with them under
    strong convexity. ``momentum=False`` is ISTA, with ``y = x`` and ``L |x_0 - p*|² / 2k``.

    Args:
      step_size: η > 0; by default 1/L with an L found by backtracking.
      momentum: Whether y runs ahead of x.
      restart: See ``accelerated``.

    For differentiable losses with any penalty or constraint. Certificate:
    ``|y - prox_{ηR}(y - η∇f(y))| / η`` at the y from which the answer is that step onward.

    References: as ``accelerated``.
    """
    return Proximal(checked_step("proximal", step_size), bool(restart), bool(momentum))
