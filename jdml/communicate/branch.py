"""A choice at run time between branches that differ in what varies over the mesh, and in bytes.

A mean is the same on every worker and what a worker keeps to itself is not; ``lax.cond`` wants one
type. Here a leaf of the result varies over an axis if it does in any branch.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jdml.communicate.wire import varying_axes

PyTree = Any
T = TypeVar("T", bound=PyTree)


def branch(predicate: jax.Array, if_true: Callable[[], T], if_false: Callable[[], T]) -> T:
    """``jax.lax.cond`` whose branches may differ in what varies over which mesh axis.

    Args:
      predicate: bool scalar, the same on every worker, or a collective inside a branch would wait
        for workers that took the other one.
      if_true: Takes nothing; returns a pytree of arrays.
      if_false: Likewise; the same structure, shapes and dtypes.
    """
    return jax.lax.cond(predicate, *_alike([if_true, if_false]))


def choose(
    name: str, index: jax.Array, branches: Sequence[Callable[[], T]]
) -> tuple[T, dict[str, jax.Array]]:
    """``branches[index]()``, and ``{"branch.NAME": index}`` to put among the state's metrics.

    A compiled program lists the collectives of all branches;
    ``jdml.sharding.bytes_per_axis(..., taken=...)`` counts those of the branches that were taken.

    Args:
      name: Letters, digits, ``_`` and ``.``; one in a chain.
      index: bool or int scalar, the same on every worker, as in :func:`branch`.
      branches: As for ``jax.lax.switch``, but for what varies; for a bool ``(if False, if True)``.
    """
    index = index.astype(jnp.int32)
    typed = _alike(branches)
    with jax.named_scope(f"branch.{name}"):
        result = jax.lax.switch(index, typed)
    return result, {f"branch.{name}": index.astype(jnp.float32)}


def first_branch(name: str) -> dict[str, jax.Array]:
    """What the metrics of :func:`choose` hold before the first step."""
    return {f"branch.{name}": jnp.zeros((), jnp.float32)}


def _alike(branches: Sequence[Callable[[], T]]) -> list[Callable[[], T]]:
    """The branches with results of one type."""
    varying = jax.tree.map(
        lambda *leaves: frozenset[str]().union(*map(varying_axes, leaves)),
        *(jax.eval_shape(f) for f in branches),
    )

    def mark(x: jax.Array, axes: frozenset[str]) -> jax.Array:
        missing = tuple(sorted(axes - varying_axes(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    def typed(f: Callable[[], T]) -> Callable[[], T]:
        return lambda: jax.tree.map(mark, f(), varying)

    return [typed(f) for f in branches]
