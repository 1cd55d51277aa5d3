"""1-bit Adam: exact Adam until its variance has settled, then compressed momentum."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jdml.aggregate.adam_parts import check_adam, check_count, preconditioned, wide, zeros
from jdml.communicate import Wire, error_feedback
from jdml.communicate.branch import choose, first_branch
from jdml.communicate.codecs import one_bit
from jdml.communicate.collectives.all_reduce import Axis, Content, check_exchange
from jdml.communicate.exchange import exchange_mean, init_exchange

PyTree = Any

SIGNS = error_feedback(one_bit())


class OneBitAdamState(NamedTuple):
    """State of :func:`one_bit_adam`'s first part.

    Attributes:
      steps: int32, steps taken.
      mu: First moment, f32, the same on every worker.
      nu: Second moment, f32, the same on every worker; fixed once the warm-up is over.
      residual: What the exchange of the momentum keeps: per worker what it still owes.
      metrics: Whether the last step was compressed.
    """

    steps: jax.Array
    mu: PyTree
    nu: PyTree
    residual: PyTree
    metrics: dict[str, jax.Array]


def one_bit_adam(
    axis: Axis,
    learning_rate: optax.ScalarOrSchedule,
    warmup_steps: int,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    codec: Content = SIGNS,
    topology: str = "two_phase",
) -> optax.GradientTransformationExtraArgs:
    """Adam on the exact mean gradient, then on a compressed momentum; a complete optimiser.

    For the first T steps, ``optax.adam`` (``optax.adamw`` with ``weight_decay``) of the mean
    gradient. After them the variance ``v`` stays as it is and the workers exchange momenta instead
    of gradients: ``m <- mean_k C(b1 m + (1 - b1) g_k + e_k)``,
    ``x <- x - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^T)) + eps)``. So Adam's steps go on without a
    jump at T, which the bias corrections, left out in the paper, are for. An element that had no
    gradient in the first T steps has no variance and does not move after them.

    Give it to ``make_step`` alone: it takes the place of ``mean_gradients`` and of the optimiser.

    Args:
      axis: The worker axis. ``update`` runs inside a ``shard_map`` in which it is manual.
      learning_rate: Number or Optax schedule.
      warmup_steps: T >= 1, until the variance has settled; in the paper 15 to 25 % of the steps.
      b1: Decay rate of the momentum.
      b2: Decay rate of the variance.
      eps: Added to the root of the variance. A codec that gives a block one magnitude moves
        elements of little variance most: raise it where gradients are sparse.
      weight_decay: Decoupled (AdamW), times the learning rate.
      codec: What carries the momentum: two-sided error feedback around the sign and one scale per
        block by default; ``None`` for the exact mean.
      topology: See :func:`jdml.communicate.all_reduce_mean`.

    State kept: two f32 moments, the same on every worker, and an f32 residual per worker.

    Bytes: T times an exact all-reduce, then those of ``codec`` in ``topology``; the metrics say
    which of the two a step had.

    Raises:
      ValueError: an argument is out of range; ``codec`` or ``topology`` is not one.

    Reference: Tang et al., "1-bit Adam: Communication Efficient Large-Scale Training with Adam's
    Convergence Speed", ICML 2021, algorithm 1.
    """
    check_count("one_bit_adam", "warmup_steps", warmup_steps, 1, "the number of exact steps")
    check_adam("one_bit_adam", b1, b2, eps, weight_decay)
    check_exchange("one_bit_adam", axis, codec, topology)
    adam = optax.scale_by_adam(b1, b2, eps)

    def init(params: PyTree) -> OneBitAdamState:
        return OneBitAdamState(
            steps=jnp.zeros((), jnp.int32),
            mu=zeros(params),
            nu=zeros(params),
            residual=init_exchange(codec, params),
            metrics=first_branch("one_bit_adam"),
        )

    def update(
        updates: PyTree,
        state: OneBitAdamState,
        params: PyTree | None = None,
        *,
        wire: Wire | None = None,
        **extra: Any,
    ) -> tuple[PyTree, OneBitAdamState]:
        del params, extra
        gradients = wide(updates)

        def exact() -> tuple[PyTree, PyTree, PyTree, PyTree]:
            mean, _ = exchange_mean(gradients, (), axis, None, topology, wire)
            moments = optax.ScaleByAdamState(state.steps, state.mu, state.nu)
            direction, moments = adam.update(mean, moments)
            return direction, moments.mu, moments.nu, state.residual

        def compressed() -> tuple[PyTree, PyTree, PyTree, PyTree]:
            mine = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, gradients)
            mu, residual = exchange_mean(mine, state.residual, axis, codec, topology, wire)
            mu = jax.tree.map(lambda m, v: jnp.where(v == 0, 0, m), mu, state.nu)
            corrected = optax.tree.bias_correction(mu, b1, state.steps + 1)
            settled = 1 - jnp.asarray(b2, jnp.float32) ** warmup_steps
            return preconditioned(corrected, state.nu, settled, eps), mu, state.nu, residual

        (direction, mu, nu, residual), metrics = choose(
            "one_bit_adam", state.steps >= warmup_steps, (exact, compressed)
        )
        steps: jax.Array = optax.safe_increment(state.steps)
        return direction, OneBitAdamState(steps, mu, nu, residual, metrics)

    parts = [optax.GradientTransformationExtraArgs(init, update)]
    if weight_decay:
        parts.append(optax.add_decayed_weights(weight_decay))
    return optax.chain(*parts, optax.scale_by_learning_rate(learning_rate))
