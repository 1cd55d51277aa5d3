"""One buffer of bytes per row, so that a payload of several arrays travels in one collective."""

import math

import jax
import jax.numpy as jnp

from jdml.communicate.codecs.base import Payload


def pack(payload: Payload) -> jax.Array:
    """All arrays of a payload, bit-cast to ``uint8`` and joined: ``[num_rows, bytes_per_row]``."""
    columns = []
    for x in jax.tree.leaves(payload):
        if x.dtype != jnp.uint8:
            x = jax.lax.bitcast_convert_type(
                x, jnp.uint8
            )  # adds a dim of itemsize when that is > 1
        columns.append(x.reshape(x.shape[0], math.prod(x.shape[1:])))
    return columns[0] if len(columns) == 1 else jnp.concatenate(columns, axis=1)


def unpack(buffer: jax.Array, like: Payload) -> Payload:
    """The inverse of :func:`pack`; ``like`` gives shapes and dtypes (its row count is ignored)."""
    leaves, treedef = jax.tree.flatten(like)
    num_rows, start, out = buffer.shape[0], 0, []
    for x in leaves:
        itemsize = jnp.dtype(x.dtype).itemsize
        shape = (num_rows, *x.shape[1:])
        stop = start + math.prod(x.shape[1:]) * itemsize
        part = buffer[:, start:stop]
        if x.dtype != jnp.uint8:
            part = part.reshape(*shape, itemsize) if itemsize > 1 else part.reshape(shape)
            part = jax.lax.bitcast_convert_type(part, x.dtype)
        out.append(part.reshape(shape))
        start = stop
    return jax.tree.unflatten(treedef, out)
