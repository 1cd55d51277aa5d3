"""Small leaves joined into long vectors, so that they do not each pay for a launch."""

import math
from collections.abc import Callable, Hashable, Sequence

import jax
import jax.numpy as jnp

from jdml.communicate.codecs.base import Codec, fill_up
from jdml.communicate.kernels.here import traced_for_tpu
from jdml.communicate.tiles import SUBLANES, filled_up, tile_width
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
      codec: Each leaf is filled up to what it takes for whole, mostly whole blocks, so that no
        block holds two leaves.
      bucket_elements: Greatest length of a bucket that holds more than one leaf.

    Returns:
      As many lists of f32 leaves; an empty leaf comes back empty.
    """
    width = tile_width(codec) if traced_for_tpu() else None
    outputs = [[jnp.zeros(x.shape, jnp.float32) for x in leaves] for leaves in trees]
    for number, members in enumerate(_plan(trees, codec, bucket_elements)):
        vectors = [_join([leaves[i] for i in members], codec, width) for leaves in trees]
        results = exchange(number, *vectors)
        for out, vector in zip(outputs, results, strict=True):
            start = 0
            for i in members:
                leaf = trees[0][i]
                out[i] = _shaped(vector[start:], leaf.shape, width)
                start += codec.whole(_length(leaf.shape, width))
    return tuple(outputs)


def plan(kinds: Sequence[Hashable], lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Groups indices of one kind, in order, up to a total length; an empty one is in no group."""
    groups: list[list[int]] = []
    open_groups: dict[Hashable, tuple[list[int], int]] = {}
    for i, (kind, length) in enumerate(zip(kinds, lengths, strict=True)):
        if length == 0:
            continue
        members, filled = open_groups.get(kind, ([], 0))
        if not members or filled + length > limit:
            members, filled = [], 0
            groups.append(members)
        members.append(i)
        open_groups[kind] = (members, filled + length)
    return groups


def _plan(
    trees: Sequence[Sequence[jax.Array]], codec: Codec, bucket_elements: int
) -> list[list[int]]:
    """Groups leaf indices; a bucket holds only leaves that vary over the same mesh axes.

    A leaf that is replicated over some axis must stay so, and joined to one that is not it would
    no longer be known to be.
    """
    kinds = [
        frozenset[str]().union(*map(varying_axes, leaves)) for leaves in zip(*trees, strict=True)
    ]
    return plan(kinds, [codec.whole(leaf.size) for leaf in trees[0]], bucket_elements)


def _join(leaves: Sequence[jax.Array], codec: Codec, width: int | None) -> jax.Array:
    """Flat f32 leaves one after the other, each filled up."""
    flat = [_flat(leaf.astype(jnp.float32), width) for leaf in leaves]
    parts = [fill_up(x, codec.whole(x.size), codec.fill) for x in flat]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def _flat(leaf: jax.Array, width: int | None) -> jax.Array:
    """The elements of a leaf as a vector: row by row, or as they lie on TPU.

    There a matrix is kept in tiles of eight rows. Blocks of ``width`` elements are taken from its
    rows either way, but eight rows' first blocks come before their second ones, so that nothing
    need be moved. The last eight may be filled up with zeros.
    """
    rows = _rows_in_place(leaf.shape, width)
    if rows is None:
        return leaf.reshape(-1)
    assert width is not None
    matrix = leaf.reshape(-1, leaf.shape[-1])
    if rows > len(matrix):
        matrix = jnp.pad(matrix, ((0, rows - len(matrix)), (0, 0)))
    tiles = matrix.reshape(rows // SUBLANES, SUBLANES, leaf.shape[-1] // width, width)
    return tiles.swapaxes(1, 2).reshape(-1)


def _shaped(vector: jax.Array, shape: tuple[int, ...], width: int | None) -> jax.Array:
    """The inverse of :func:`_flat`, of a vector at least as long."""
    rows = _rows_in_place(shape, width)
    if rows is None:
        return vector[: math.prod(shape)].reshape(shape)
    assert width is not None
    blocks = shape[-1] // width
    tiles = vector[: rows * shape[-1]].reshape(rows // SUBLANES, blocks, SUBLANES, width)
    matrix = tiles.swapaxes(1, 2).reshape(rows, shape[-1])
    return matrix[: math.prod(shape[:-1])].reshape(shape)


def _length(shape: tuple[int, ...], width: int | None) -> int:
    """Elements of :func:`_flat`."""
    rows = _rows_in_place(shape, width)
    return math.prod(shape) if rows is None else rows * shape[-1]


def _rows_in_place(shape: tuple[int, ...], width: int | None) -> int | None:
    """Rows of the matrix that is taken as it lies, if its blocks allow that and it is cheap."""
    if width is None or len(shape) < 2 or shape[-1] % width:
        return None
    rows = math.prod(shape[:-1])
    # Matrices that are no whole tiles each do not lie as one.
    if len(shape) > 2 and shape[-2] % SUBLANES:
        return None
    return filled_up(rows, SUBLANES)
