"""Vectors as matrices of whole TPU tiles, for exchanges and the codecs that they use.

TPU keeps a matrix in tiles of 8 × 128 elements. A few long rows, one for each worker, lie in other
places than the same elements as blocks: each way from one to the other copies everything, in code
that grows with the data. On one 67 MB leaf (v5e, libtpu 0.0.51) int8 in two phases over four
workers was a program of 33 to 84 MB, which took 40 to 60 s to compile. As ``[rows, blocks, block]``
from one end to the other it is 1 MB and 2 s. To a CPU the two are one and the same.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

from jdml.communicate.codecs.base import Codec, Payload
from jdml.communicate.kernels.here import traced_for_tpu

LANES = 128
"""Elements in a row of a tile."""
SUBLANES = 8
"""Rows of a tile."""

Exchange = Callable[..., tuple[jax.Array, jax.Array | None]]
"""``(vector, axis, codec, key, feedback) -> (mean, error or None)``: see ``TOPOLOGIES``."""


def tile_width(codec: Codec) -> int | None:
    """Elements in a row of the matrix: a codec's block, if blocks are whole rows of tiles."""
    if codec.elementwise:
        return LANES
    width = getattr(codec, "block", None) or codec.granularity
    fits = width % LANES == 0 and codec.granularity % width == 0
    return width if fits else None


def filled_up(num_rows: int, multiple: int) -> int | None:
    """``num_rows``, up to the next multiple; ``None`` if that would add more than a hundredth."""
    missing = -num_rows % multiple
    return None if 100 * missing > num_rows else num_rows + missing


@dataclasses.dataclass(frozen=True)
class InTiles(Codec):
    """A codec of rows of matrix rows: the length of a row is counted in blocks of ``width``.

    ``encode_rows`` takes ``[num_rows, length, width]`` and ``decode_rows`` returns it; the payload
    is the codec's own, of ``length * width`` elements.
    """

    codec: Codec
    width: int
    multiple: int = 1
    """Row lengths are a multiple of this, too: on TPU whole tiles need not be moved."""

    @property
    def needs_key(self) -> bool:  # type: ignore[override]
        return self.codec.needs_key

    @property
    def granularity(self) -> int:
        return math.lcm(max(self.codec.granularity // self.width, 1), self.multiple)

    def encode_rows(self, rows: jax.Array, key: jax.Array | None = None) -> Payload:
        if not self.codec.elementwise:
            rows = rows.reshape(rows.shape[0], -1)
        return self.codec.encode_rows(rows, key)

    def decode_rows(self, payload: Payload, length: int) -> jax.Array:
        rows = self.codec.decode_rows(payload, length * self.width)
        return rows.reshape(-1, length, self.width)

    def decode_sum(self, payload: Payload, length: int, divisor: int = 1) -> jax.Array:
        total = self.codec.decode_sum(payload, length * self.width, divisor)
        return total.reshape(length, self.width)

    def payload_bytes(self, length: int) -> int:
        return self.codec.payload_bytes(length * self.width)


def in_tiles(exchange: Exchange) -> Exchange:
    """``exchange`` of a vector as a matrix, where the codec's blocks make one; same bits and bytes.

    What is given to ``exchange`` then has one more dim, after the one that it cuts and joins. On
    TPU chunks of long vectors are filled up to whole tiles: at most a hundredth is added.
    """

    def tiled(
        vector: jax.Array, axis: Any, codec: Codec, key: Any, feedback: Any
    ) -> tuple[jax.Array, jax.Array | None]:
        width, num_workers = tile_width(codec), int(jax.lax.axis_size(axis))
        if width is None or vector.size % width:
            return exchange(vector, axis, codec, key, feedback)
        matrix, multiple = vector.reshape(-1, width), 1
        if traced_for_tpu() and filled_up(len(matrix), SUBLANES * num_workers):
            multiple = SUBLANES
        elif codec.whole(1) < max(width, codec.granularity) and len(matrix) % (
            num_workers * max(codec.granularity // width, 1)
        ):
            return exchange(vector, axis, codec, key, feedback)  # whole rows would be more to say
        out = exchange(matrix, axis, InTiles(codec, width, multiple), key, feedback)
        if traced_for_tpu():
            # Else XLA gives the last step of decoding the leaf's shape, and each of its operands.
            # One barrier for each: together (jax 0.10) the mean would vary as the error does.
            out = jax.tree.map(jax.lax.optimization_barrier, out)
        mean, error = out
        return mean.reshape(-1), None if error is None else error.reshape(-1)

    return tiled
