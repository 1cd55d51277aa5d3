"""What 1-bit Adam and 0/1 Adam share: arguments, and a step with a variance that is kept."""

from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def check_adam(name: str, b1: float, b2: float, eps: float, weight_decay: float) -> None:
    """Raises unless these can be Adam's; ``name`` is the caller's, for the message."""
    for what, value in (("b1", b1), ("b2", b2)):
        if not 0 <= value < 1:
            raise ValueError(f"{name}({what}={value!r}): expected a decay rate in [0, 1).")
    for what, value in (("eps", eps), ("weight_decay", weight_decay)):
        if not value >= 0:
            raise ValueError(f"{name}({what}={value!r}): expected a number >= 0.")


def check_count(name: str, what: str, value: Any, least: int, meaning: str) -> None:
    """Raises unless ``value`` is an int of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}({what}={value!r}): expected an int >= {least}, {meaning}.")


def preconditioned(x: PyTree, nu: PyTree, correction: jax.Array, eps: float) -> PyTree:
    """``x / (sqrt(nu / correction) + eps)``, and 0 where the second moment ``nu`` is 0.

    An element that never had a gradient has no variance. A codec that gives all elements of a block
    one magnitude says that it has a momentum, which divided by ``eps`` would be a step of any size.
    """

    def divide(x: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.where(v == 0, 0, x / (jnp.sqrt(v / correction) + eps))

    return jax.tree.map(divide, x, nu)


def zeros(params: PyTree) -> PyTree:
    """f32 zeros, shaped and placed like the parameters."""
    return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.float32), params)


def wide(tree: PyTree) -> PyTree:
    """Every leaf in f32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)
