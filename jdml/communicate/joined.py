"""Means of many small arrays in few collectives."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jdml.communicate.buckets import BUCKET_ELEMENTS
from jdml.communicate.wire import varying_axes


def joined_mean(
    xs: Sequence[jax.Array], axis: str | tuple[str, ...], small: int = BUCKET_ELEMENTS
) -> list[jax.Array]:
    """Exact means of f32 arrays over a mesh axis; those below ``small`` travel as one vector.

    Where another mesh axis is automatic, an array may be divided over it and cannot be joined to
    others without being gathered: there the arrays go to one ``psum``, which XLA's compilers make
    one collective as far as they think it good.
    """
    means = [jnp.zeros(x.shape, x.dtype) for x in xs]
    if _automatic_axes():
        groups = [[i for i, x in enumerate(xs) if x.size]]
        for i, mean in zip(groups[0], jax.lax.pmean([xs[i] for i in groups[0]], axis), strict=True):
            means[i] = mean
        return means
    # Joined to one that varies over more axes, an array would no longer be known not to.
    joined: dict[frozenset[str], list[int]] = {}
    for i, x in enumerate(xs):
        if x.size >= small:
            means[i] = jax.lax.pmean(x, axis)
        elif x.size:
            joined.setdefault(varying_axes(x), []).append(i)
    for members in joined.values():
        vector = jnp.concatenate([xs[i].reshape(-1) for i in members])
        vector = jax.lax.pmean(vector, axis)
        start = 0
        for i in members:
            means[i] = vector[start : start + xs[i].size].reshape(xs[i].shape)
            start += xs[i].size
    return means


def _automatic_axes() -> list[str]:
    """Mesh axes, here, of more than one device over which arrays may be divided unseen."""
    mesh = jax.sharding.get_abstract_mesh()
    return [
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind != jax.sharding.AxisType.Manual and mesh.shape[name] > 1
    ]
