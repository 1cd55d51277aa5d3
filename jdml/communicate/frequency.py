"""Frequency in time: how often the workers exchange, and how late a result may be used."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

PyTree = Any
Every = int | Callable[[jax.Array], jax.Array]
"""Steps between exchanges: a number, or a function of the number of steps taken."""


def check_every(name: str, every: Every, *, schedules: bool = True) -> None:
    """Raises unless ``every`` is an int >= 1 or, with ``schedules``, a function.

    ``name`` is the caller's, for the message.
    """
    if schedules and callable(every):
        return
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(
            f"{name}(every={every!r}): expected an int >= 1, the number of local steps between "
            "exchanges (1: after every step)"
            + (", or a function of the steps taken that gives it." if schedules else ".")
        )


def is_due(every: Every, steps: jax.Array, last: jax.Array) -> jax.Array:
    """Whether an exchange is due after ``steps`` steps, the last one having been after ``last``.

    Args:
      every: See :data:`Every`; a function is asked at each step, so that a schedule may shorten an
        interval that has begun.
      steps: int32, steps taken, this one included.
      last: int32, steps that had been taken at the last exchange; 0 before the first.
    """
    interval = every(steps) if callable(every) else every
    return steps - last >= jnp.maximum(interval, 1)


def post_local(num_steps: int, every: int) -> Callable[[jax.Array], jax.Array]:
    """Post-local SGD: in step for the first ``num_steps``, then every ``every`` steps.

    Reference: Lin et al., "Don't Use Large Mini-Batches, Use Local SGD", ICLR 2020.
    """
    if num_steps < 0:
        raise ValueError(f"post_local(num_steps={num_steps}): expected at least 0.")
    check_every("post_local", every)
    return lambda steps: jnp.where(steps <= num_steps, 1, every)


class DelayedState(NamedTuple):
    """State of :func:`delayed`.

    Attributes:
      waiting: The gradients of the last ``steps`` steps, oldest first, per worker.
      inner: State of the delayed transformation.
    """

    waiting: tuple[PyTree, ...]
    inner: Any


def delayed(
    transformation: optax.GradientTransformation, steps: int = 1
) -> optax.GradientTransformationExtraArgs:
    """Applies ``transformation`` to the gradients of ``steps`` steps ago.

    Step t computes ``g_t`` and at the same time exchanges ``g_{t - steps}``, which waited in the
    state: neither needs the other, so the compiler may run the exchange behind the computation.
    ``chain(delayed(mean_gradients("data", int8())), adamw(...))``. The first ``steps`` steps see
    zeros. Where the compiler splits a collective into start and done, the whole step stands between
    the two; on TPU all-to-alls and all-reduces want ``jdml.sharding.ASYNCHRONOUS_ON_TPU`` for that
    (``benchmarks/overlap.py`` reads the schedules).

    Late gradients bear lower learning rates alone: on a quadratic of curvature L,
    ``w <- w - eta L w_{t - steps}`` converges if and only if
    ``eta < 2 sin(pi / (2 (2 steps + 1))) / L``: 2/L, 1/L, 0.618/L for 0, 1 and 2 steps.

    Args:
      transformation: One that acts on gradients, such as ``mean_gradients`` or ``dgc``.
      steps: At least 0; 0 is the transformation itself.

    State kept: ``steps`` more copies of the gradients, per worker.

    Reference: pipelined SGD: Li et al., "Pipe-SGD", NeurIPS 2018. The bound: Levin & May, "A Note
    on Difference-Delay Equations", 1976.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise ValueError(f"delayed(steps={steps!r}): expected an int >= 0.")
    inner = optax.with_extra_args_support(transformation)

    def init(params: PyTree) -> DelayedState:
        waiting = tuple(jax.tree.map(jnp.zeros_like, params) for _ in range(steps))
        return DelayedState(waiting, inner.init(params))

    def update(
        updates: PyTree, state: DelayedState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, DelayedState]:
        oldest, *rest = (*state.waiting, updates)
        out, inner_state = inner.update(oldest, state.inner, params, **extra)
        return out, DelayedState(tuple(rest), inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
