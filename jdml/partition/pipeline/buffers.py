"""Arrays in numbered slots."""

from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def get(array: jax.Array, *at: Any) -> jax.Array:
    """``array[at]``."""
    rest = array.shape[len(at) :]
    start = (*at, *(0,) * len(rest))
    return jax.lax.dynamic_slice(array, start, (1,) * len(at) + rest).reshape(rest)


def put_at(array: jax.Array, value: jax.Array, *at: Any) -> jax.Array:
    """``array`` with ``value`` at ``array[at]``."""
    # Not ``array.at[...].set``: a scatter, which partitioners handle worse.
    start = (*at, *(0,) * value.ndim)
    return jax.lax.dynamic_update_slice(array, value.reshape((1,) * len(at) + value.shape), start)


def take(buffers: PyTree, slot: Any) -> PyTree:
    """What each buffer has in the slot."""
    return jax.tree.map(lambda a: get(a, slot), buffers)


def put(buffers: PyTree, slot: jax.Array, values: PyTree) -> PyTree:
    """``values`` in the slot; a negative one leaves the buffers as they are."""

    def leaf(buffer: jax.Array, value: jax.Array) -> jax.Array:
        at = jnp.maximum(slot, 0)
        return put_at(buffer, jnp.where(slot >= 0, value, get(buffer, at)), at)

    return jax.tree.map(leaf, buffers, values)


def zeros(shapes: PyTree, *lead: int) -> PyTree:
    """Zeros ``[*lead, ...]`` for each of the shapes."""
    return jax.tree.map(lambda s: jnp.zeros((*lead, *s.shape), s.dtype), shapes)


def wide(dtype: Any) -> Any:
    """The dtype of sums: f32, or the dtype itself where that is wider."""
    return jnp.promote_types(dtype, jnp.float32)
