"""Rows moved to other places, where the gradient moves them back.

A mixture of experts sorts tokens, and puts each result back where its token stood. JAX's gradient
of a gather is a scatter that adds; but here every place is filled by one row at most and both
directions are known, so that the gradient is a gather, too.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Places(NamedTuple):
    """Where rows stand after a move, each in one place at most.

    ``source``: int32 [places]: which of ``copies · rows`` stands there (copy c of row r is
    ``r · copies + c``), or ``copies · rows`` where none does. ``target``: int32 [rows, copies]: the
    place of each copy, or ``places`` where it has none.
    """

    source: jax.Array
    target: jax.Array


def places_of(target: jax.Array, num_places: int) -> Places:
    """``Places`` from the place of each copy, int32 [rows, copies]; ``num_places`` for none."""
    number = jnp.arange(target.size, dtype=jnp.int32)
    empty = jnp.full_like(target, target.size, shape=num_places)
    source = empty.at[target.ravel()].set(number, mode="drop", unique_indices=False)
    return Places(source, target)


def spread(x: jax.Array, places: Places) -> jax.Array:
    """[rows, width] → [places, width]: the copies of each row in their places, zeros elsewhere."""
    copies = places.target.shape[1]
    return _take(x, places.source // copies, places.target)


def collect(x: jax.Array, places: Places) -> jax.Array:
    """[places, width] → [rows, copies, width]: what stands in each copy's place, zeros for none."""
    rows, copies = places.target.shape
    taken = _take(x, places.target.ravel(), places.source[:, None])
    return taken.reshape(rows, copies, x.shape[-1])


@jax.custom_vjp
def _take(x: jax.Array, source: jax.Array, back: jax.Array) -> jax.Array:
    """``x[source]``, zeros past the end; row i of the gradient is the sum over ``back[i]``."""
    return jnp.take(x, source, axis=0, mode="fill", fill_value=0)


def _take_forward(x: jax.Array, source: jax.Array, back: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _take(x, source, back), back


def _take_backward(back: jax.Array, gradient: jax.Array) -> tuple[jax.Array, None, None]:
    parts = jnp.take(gradient, back, axis=0, mode="fill", fill_value=0)
    return jnp.sum(parts, axis=1, dtype=jnp.float32).astype(gradient.dtype), None, None


_take.defvjp(_take_forward, _take_backward)
