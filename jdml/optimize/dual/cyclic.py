"""Cyclic dual coordinate ascent: the samples in their order, again and again."""

import dataclasses

from jdml.optimize.dual.sdca import CoordinateAscent


@dataclasses.dataclass(frozen=True)
class CyclicAscent(CoordinateAscent):
    name = "cyclic_dual_ascent"
    sampling = "deterministic"
    draw = "cyclic"


def cyclic_dual_ascent(shrink: bool = False) -> CyclicAscent:
    """``sdca`` with the samples in the order in which they are given.

    The same coordinate steps, so that the dual never falls; linear convergence for the losses and
    penalties that ``sdca`` is for. An order in which the labels are sorted is a slow one.

    Args:
      shrink: As of ``sdca``.

    Reference: Luo & Tseng, "On the Convergence of the Coordinate Descent Method for Convex
    Differentiable Minimization", JOTA 1992.
    """
    return CyclicAscent(bool(shrink))
