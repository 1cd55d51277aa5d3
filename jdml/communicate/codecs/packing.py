"""One buffer of bytes per row, so that a payload of several arrays travels in one collective.

The bytes of a wide element are not neighbours: all lowest bytes come first, then all second ones.
Side by side they would form a dim of 4, which TPU lays out in tiles of 128 and takes apart element
by element: 65,536 scales cost 5 MB of program and 8 s of compilation, twice in each exchange
(v5e, libtpu 0.0.51). Planes cost shifts.
"""

import math

import jax
import jax.numpy as jnp

from jdml.communicate.codecs.base import Payload


def pack(payload: Payload) -> jax.Array:
    """All arrays of a payload as ``uint8``, joined: ``[num_rows, bytes_per_row]``."""
    planes = []
    for x in jax.tree.leaves(payload):
        x = _bits(x).reshape(x.shape[0], math.prod(x.shape[1:]))
        planes += [(x >> (8 * i)).astype(jnp.uint8) for i in range(x.dtype.itemsize)]
    return planes[0] if len(planes) == 1 else jnp.concatenate(planes, axis=1)


def unpack(buffer: jax.Array, like: Payload) -> Payload:
    """The inverse of :func:`pack`; ``like`` gives shapes and dtypes (its row count is ignored)."""
    leaves, treedef = jax.tree.flatten(like)
    num_rows, start, out = buffer.shape[0], 0, []
    for x in leaves:
        word, size = _word(x.dtype), math.prod(x.shape[1:])
        bits = jnp.zeros((num_rows, size), word)
        for i in range(word.itemsize):
            plane = buffer[:, start : start + size].astype(word)
            bits = bits | (plane << (8 * i))
            start += size
        bits = bits.reshape(num_rows, *x.shape[1:])
        out.append(jax.lax.bitcast_convert_type(bits, x.dtype))
    return jax.tree.unflatten(treedef, out)


def _word(dtype: jnp.dtype) -> jnp.dtype:
    """The unsigned integer as wide as ``dtype``."""
    return jnp.dtype(f"uint{8 * jnp.dtype(dtype).itemsize}")


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, _word(x.dtype))
