"""One buffer of bytes per row, so that a payload of several arrays travels in one collective.

The bytes of a wide element are not neighbours: all lowest bytes come first, then all second ones.
Side by side they would form a dim of 4, which TPU lays out in tiles of 128 and takes apart element
by element: 65,536 scales cost 5 MB of program and 8 s of compilation, twice in each exchange
(v5e, libtpu 0.0.51). Planes cost shifts. Values narrower than a byte share one in the same way.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jdml.communicate.codecs.base import Payload

PyTree = Any

_LONG = 1 << 16
_LANES = 128


def pack(payload: Payload) -> jax.Array:
    """All arrays of a payload as ``uint8``, joined: ``[num_rows, bytes_per_row]``.

    From 64 KiB a row in lines, ``[num_rows, lines, bytes_per_line]``, where arrays that are no
    whole number of lines share the last ones, filled up with less than a line of zeros. XLA's
    all-to-all of a few long rows of bytes was 9 MB of program for 17 MB of payload on TPU, of the
    same bytes in lines 0.1 MB (v5e, libtpu 0.0.51).
    """
    line = _line(payload)
    in_lines, in_rows = [], []
    for x in jax.tree.leaves(payload):
        rest = math.prod(x.shape[1:])
        if line and rest % line == 0:
            in_lines += _planes(x.reshape(x.shape[0], rest // line, line))
        else:
            in_rows += _planes(x.reshape(x.shape[0], rest))
    if not line:
        return _joined(in_rows)
    if in_rows:
        missing = -sum(x.shape[1] for x in in_rows) % line
        in_rows.append(jnp.zeros((in_rows[0].shape[0], missing), jnp.uint8))
        in_lines.append(_joined(in_rows).reshape(in_rows[0].shape[0], -1, line))
    return _joined(in_lines)


def unpack(buffer: jax.Array, like: Payload) -> Payload:
    """The inverse of :func:`pack`; ``like`` gives shapes and dtypes (its row count is ignored)."""
    leaves, treedef = jax.tree.flatten(like)
    line, num_rows, start = _line(like), buffer.shape[0], 0
    out: list[jax.Array | None] = [None] * len(leaves)
    sizes = [math.prod(x.shape[1:]) for x in leaves]
    if line:
        for i, x in enumerate(leaves):
            if sizes[i] % line == 0:
                out[i], start = _read(buffer, start, sizes[i] // line, x)
        buffer, start = buffer[:, start:].reshape(num_rows, -1), 0
    for i, x in enumerate(leaves):
        if out[i] is None:
            out[i], start = _read(buffer, start, sizes[i], x)
    return jax.tree.unflatten(treedef, out)


def _line(payload: Payload) -> int | None:
    """Bytes in a line, or ``None`` for rows that are short.

    The last dim of the longest array, which need not be laid out anew then, if it is whole TPU
    lanes.
    """
    leaves = jax.tree.leaves(payload)
    if sum(math.prod(x.shape[1:]) * x.dtype.itemsize for x in leaves) < _LONG:
        return None
    longest = max(leaves, key=lambda x: math.prod(x.shape[1:]))
    return longest.shape[-1] if longest.ndim > 2 and longest.shape[-1] % _LANES == 0 else _LANES


def _planes(x: jax.Array) -> list[jax.Array]:
    bits = _bits(x)
    return [(bits >> (8 * i) if i else bits).astype(jnp.uint8) for i in range(x.dtype.itemsize)]


def _joined(arrays: list[jax.Array]) -> jax.Array:
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis=1)


def _read(buffer: jax.Array, start: int, size: int, like: jax.Array) -> tuple[jax.Array, int]:
    """The array whose planes of ``size`` start there, and where the next one starts."""
    word = _word(like.dtype)
    # XLA for TPU does not know a shift by nothing for nothing, and copies: none for the first.
    bits = buffer[:, start : start + size].astype(word)
    for i in range(1, word.itemsize):
        plane = buffer[:, start + i * size : start + (i + 1) * size].astype(word)
        bits = bits | (plane << (8 * i))
    bits = bits.reshape(buffer.shape[0], *like.shape[1:])
    return jax.lax.bitcast_convert_type(bits, like.dtype), start + word.itemsize * size


def cut(tree: PyTree, num_runs: int) -> list[PyTree]:
    """A pytree of arrays ``[rows, n, ...]``, cut along ``n`` into ``num_runs`` equal runs."""

    def run(x: jax.Array, k: int) -> jax.Array:
        n = x.shape[1] // num_runs
        return x[:, k * n : (k + 1) * n]

    return [jax.tree.map(lambda x, k=k: run(x, k), tree) for k in range(num_runs)]


def join_planes(runs: Sequence[jax.Array], width: int) -> jax.Array:
    """``8 / width`` integer arrays as one of ``uint8``: the low ``width`` bits of each.

    The ``k``-th goes to bits ``k * width`` and up: whole runs lie beside each other, so that
    neighbouring values need not be taken apart.
    """
    joined = jnp.zeros((), jnp.uint8)
    for k, x in enumerate(runs):
        joined = joined | ((x & ((1 << width) - 1)) << (k * width)).astype(jnp.uint8)
    return joined


def split_planes(joined: jax.Array, width: int) -> list[jax.Array]:
    """The inverse of :func:`join_planes`: ``uint8`` arrays."""
    mask = (1 << width) - 1
    return [(joined >> k) & mask for k in range(0, 8, width)]


def _word(dtype: jnp.dtype) -> jnp.dtype:
    """The unsigned integer as wide as ``dtype``."""
    return jnp.dtype(f"uint{8 * jnp.dtype(dtype).itemsize}")


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, _word(x.dtype))
