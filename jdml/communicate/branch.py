"""A choice at run time between two branches that differ in what varies over the mesh."""

from collections.abc import Callable
from typing import Any

import jax

from jdml.communicate.wire import varying_axes

PyTree = Any


def branch(
    predicate: jax.Array,
    if_true: Callable[[], PyTree],
    if_false: Callable[[], PyTree],
) -> PyTree:
    """``jax.lax.cond`` whose branches may differ in what varies over which mesh axis.

    A mean is the same on every worker and what a worker keeps to itself is not; ``lax.cond`` wants
    one type. Here a leaf of the result varies over an axis if it does in either branch.

    Args:
      predicate: bool scalar, the same on every worker, or a collective inside a branch would wait
        for workers that took the other one.
      if_true: Takes nothing; returns a pytree of arrays.
      if_false: Likewise; the same structure, shapes and dtypes.
    """
    varying = jax.tree.map(
        lambda a, b: varying_axes(a) | varying_axes(b),
        jax.eval_shape(if_true),
        jax.eval_shape(if_false),
    )

    def typed(f: Callable[[], PyTree]) -> Callable[[], PyTree]:
        def mark(x: jax.Array, axes: frozenset[str]) -> jax.Array:
            missing = tuple(sorted(axes - varying_axes(x)))
            return jax.lax.pcast(x, missing, to="varying") if missing else x

        return lambda: jax.tree.map(mark, f(), varying)

    return jax.lax.cond(predicate, typed(if_true), typed(if_false))
