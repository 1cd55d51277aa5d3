"""BMUF: model averaging whose steps from round to round have a momentum of their own."""

import math
from typing import Any

import jax
import optax

from jdml.aggregate.average_params import AverageParamsState, average_params
from jdml.communicate.collectives.all_reduce import Axis, Content
from jdml.communicate.frequency import Every

PyTree = Any


def bmuf(
    axis: Axis,
    every: Every,
    block_momentum: float | None = None,
    block_learning_rate: float = 1.0,
    nesterov: bool = True,
    codec: Content = None,
    topology: str = "two_phase",
) -> optax.GradientTransformationExtraArgs:
    """Blockwise model-update filtering: ``average_params`` with SGD as its outer optimiser.

    With G how far the mean of the workers' models is from the last agreed one: ``D <- eta D + zeta
    G; w <- w + D``, and workers go on from ``w``, or with ``nesterov`` from ``w + eta D``. That is
    SGD with learning rate zeta and (Nesterov) momentum eta on the agreed model. ``eta = 0`` and
    ``zeta = 1`` is plain model averaging.

    Args:
      axis: The worker axis.
      every: Local steps per round.
      block_momentum: eta, in ``[0, 1)``; ``None`` takes ``1 - 1/K`` for K workers.
      block_learning_rate: zeta, greater than 0.
      nesterov: Whether the workers start from where the momentum will lead.
      codec: See :func:`jdml.aggregate.average_params`, also for bytes and errors.
      topology: See :func:`jdml.communicate.all_reduce_mean`.

    State kept: the workers' own models; two more copies of the parameters, shared: the agreed model
    and D; with error feedback an f32 residual per worker.

    Raises:
      ValueError: an argument is out of its range.

    Reference: Chen & Huo, "Scalable training of deep learning machines by incremental block
    training with intra-block parallel optimization and blockwise model-update filtering", 2016.
    """
    if block_momentum is not None and not 0 <= block_momentum < 1:
        raise ValueError(f"bmuf(block_momentum={block_momentum!r}): expected 0 <= eta < 1.")
    if not (math.isfinite(block_learning_rate) and block_learning_rate > 0):
        raise ValueError(
            f"bmuf(block_learning_rate={block_learning_rate!r}): expected zeta > 0; 1 is usual."
        )

    def build(eta: float) -> optax.GradientTransformationExtraArgs:
        outer = optax.sgd(block_learning_rate, momentum=eta, nesterov=nesterov)
        return average_params(axis, every, outer, codec, topology)

    def built() -> optax.GradientTransformationExtraArgs:
        """K is known where the axis is bound."""
        return build(1 - 1 / jax.lax.axis_size(axis) if block_momentum is None else block_momentum)

    build(0.0)  # refuses bad arguments at once

    def init(params: PyTree) -> AverageParamsState:
        return built().init(params)

    def update(
        updates: PyTree, state: AverageParamsState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, AverageParamsState]:
        return built().update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(init, update)
