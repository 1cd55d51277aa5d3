"""What runs for one element at a time, even under ``vmap``."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap


def one_by_one(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which under ``vmap`` runs for one element after the other.

    A training step maps over the workers, of which each device has one: that one is taken out and
    put back. Mapped in earnest, a loop would go on for all as long as for the longest and a
    ``cond`` would compute both branches; JAX cannot map ``ragged_dot`` over each of its operands,
    nor, where axes are manual, a loop whose body exchanges.

    Args:
      function: takes and returns pytrees of arrays, and is not differentiated (``custom_vjp``).
    """
    function = custom_vmap(function)

    @function.def_vmap
    def rule(size: int, is_mapped: list[Any], *args: Any) -> tuple[Any, Any]:
        def at(number: Any) -> Any:
            pick = lambda yes, x: x[number] if yes else x  # noqa: E731
            return function(*jax.tree.map(pick, tuple(is_mapped), args))

        if size == 1:
            out = jax.tree.map(lambda x: x[None], at(0))
        else:
            out = jax.lax.map(at, jnp.arange(size))
        return out, jax.tree.map(lambda _: True, out)

    return function
