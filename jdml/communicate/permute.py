"""``ppermute`` over one axis or several, whatever the order in which they are named."""

from collections.abc import Sequence

import jax
import numpy as np

Axis = str | tuple[str, ...]


def permute(x: jax.Array, axis: Axis, pairs: Sequence[tuple[int, int]]) -> jax.Array:
    """Sends ``x`` from the first to the second worker of each pair; zeros where nothing arrives.

    Workers are numbered as ``jax.lax.axis_index(axis)`` does, row-major in the order of ``axis``.
    ``jax.lax.ppermute`` numbers them in the mesh's order instead: jax 0.10 does so silently and
    0.12 refuses another order. Inside ``shard_map``.
    """
    if isinstance(axis, str):
        return jax.lax.ppermute(x, axis, pairs)
    order = jax.sharding.get_abstract_mesh().axis_names
    in_order = tuple(sorted(axis, key=order.index))
    if in_order == axis:
        return jax.lax.ppermute(x, axis, pairs)
    sizes = [jax.lax.axis_size(a) for a in axis]
    numbers = np.arange(np.prod(sizes)).reshape([jax.lax.axis_size(a) for a in in_order])
    places = numbers.transpose([in_order.index(a) for a in axis]).reshape(-1)
    return jax.lax.ppermute(x, in_order, [(int(places[s]), int(places[t])) for s, t in pairs])
