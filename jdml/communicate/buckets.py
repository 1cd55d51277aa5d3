"""Small leaves joined into long vectors, so that they do not each pay for a launch."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jdml.communicate.codecs.base import Codec, fill_up
from jdml.communicate.kernels.here import traced_for_tpu
from jdml.communicate.tiles import tile_width
from jdml.communicate.wire import varying_axes

BUCKET_ELEMENTS = 1 << 20
"""A leaf at least this long travels alone: joining it would only copy it."""


def map_in_buckets(
    exchange: Callable[..., tuple[jax.Array, ...]],
    trees: Sequence[Sequence[jax.Array]],
    codec: Codec,
    bucket_elements: int = BUCKET_ELEMENTS,
) -> tuple[list[jax.Array], ...]:
    """Applies a function of vectors to leaves joined into 1-D f32 vectors.

    Args:
      exchange: Takes the bucket's index and one f32 vector per entry of ``trees``; returns as many
        of the same length.
      trees: Lists of leaves, equal in shape from list to list.
      codec: Each leaf starts at a multiple of its granularity, so that no block holds two leaves.
      bucket_elements: Greatest length of a bucket that holds more than one leaf.

    Returns:
      As many lists of f32 leaves; an empty leaf comes back empty.
    """
    granularity = codec.granularity
    width = tile_width(codec) if traced_for_tpu() else None
    outputs = [[jnp.zeros(x.shape, jnp.float32) for x in leaves] for leaves in trees]
    for number, members in enumerate(_plan(trees, granularity, bucket_elements)):
        vectors = [_join([leaves[i] for i in members], codec, width) for leaves in trees]
        results = exchange(number, *vectors)
        for out, vector in zip(outputs, results, strict=True):
            start = 0
            for i in members:
                leaf = trees[0][i]
                out[i] = _shaped(vector[start : start + leaf.size], leaf.shape, width)
                start += _ceil(leaf.size, granularity)
    return tuple(outputs)


def _plan(
    trees: Sequence[Sequence[jax.Array]], granularity: int, bucket_elements: int
) -> list[list[int]]:
    """Groups leaf indices; a bucket holds only leaves that vary over the same mesh axes.

    A leaf that is replicated over some axis must stay so, and joined to one that is not it would
    no longer be known to be.
    """
    buckets: list[list[int]] = []
    open_buckets: dict[frozenset[str], tuple[list[int], int]] = {}
    for i, leaf in enumerate(trees[0]):
        if leaf.size == 0:
            continue
        length = _ceil(leaf.size, granularity)
        varying = frozenset[str]().union(*(varying_axes(leaves[i]) for leaves in trees))
        members, filled = open_buckets.get(varying, ([], 0))
        if not members or filled + length > bucket_elements:
            members, filled = [], 0
            buckets.append(members)
        members.append(i)
        open_buckets[varying] = (members, filled + length)
    return buckets


def _ceil(size: int, granularity: int) -> int:
    return math.ceil(size / granularity) * granularity


def _join(leaves: Sequence[jax.Array], codec: Codec, width: int | None) -> jax.Array:
    """Flat f32 leaves one after the other, each filled up to whole blocks."""
    parts = [
        fill_up(_flat(leaf.astype(jnp.float32), width), codec.granularity, codec.fill)
        for leaf in leaves
    ]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


_SUBLANES = 8  # rows of a TPU tile


def _flat(leaf: jax.Array, width: int | None) -> jax.Array:
    """The elements of a leaf as a vector: row by row, or where they lie on TPU.

    There a matrix is kept in tiles of eight rows. Blocks of ``width`` elements are taken from its
    rows either way, but eight rows' first blocks come before their second ones, so that nothing
    need be moved.
    """
    if not _in_place(leaf.shape, width):
        return leaf.reshape(-1)
    return leaf.reshape(_split(leaf.shape, width)).swapaxes(-3, -2).reshape(-1)


def _shaped(vector: jax.Array, shape: tuple[int, ...], width: int | None) -> jax.Array:
    """The inverse of :func:`_flat`."""
    if not _in_place(shape, width):
        return vector.reshape(shape)
    rows, row, blocks, block = _split(shape, width)
    return vector.reshape(rows, blocks, row, block).swapaxes(-3, -2).reshape(shape)


def _in_place(shape: tuple[int, ...], width: int | None) -> bool:
    return (
        width is not None
        and len(shape) > 1
        and shape[-2] % _SUBLANES == 0
        and shape[-1] % width == 0
    )


def _split(shape: tuple[int, ...], width: int | None) -> tuple[int, int, int, int]:
    assert width is not None
    return (-1, _SUBLANES, shape[-1] // width, width)
