"""Projected gradient descent."""

import dataclasses

from jdml.optimize.base import proximal_refusal
from jdml.optimize.first_order.gradient_descent import checked_step
from jdml.optimize.first_order.proximal import Proximal


@dataclasses.dataclass(frozen=True)
class Projected(Proximal):
    name = "projected"
    certificate = "projected-gradient norm"

    @classmethod
    def refusal(cls, problem):
        if not problem.penalty.constraint:
            return f"{problem.penalty.name} is no constraint to project onto"
        return proximal_refusal(problem)


def projected(step_size: float | None = None, momentum: bool = False) -> Projected:
    """``x <- Π_C(y - η ∇f(y))``, ``Π_C`` the projection onto the constrained set.

    ``f(x_k) - f* <= L |x_0 - p*|² / 2k``; with ``momentum``, as ``accelerated`` with restarts.

    Args:
      step_size: η > 0; by default 1/L with an L found by backtracking.
      momentum: Whether y runs ahead of x.

    For differentiable losses with a constraint; an intercept is free. Certificate:
    ``|y - Π_C(y - η∇f(y))| / η``.

    Reference: Levitin & Polyak, "Constrained Minimization Methods", 1966.
    """
    return Projected(checked_step("projected", step_size), True, bool(momentum))
