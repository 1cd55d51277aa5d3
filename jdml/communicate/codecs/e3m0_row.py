"""E3M0 with one scale for a whole row, sent inside the codes: four bits an element and no more."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jdml.communicate.codecs.base import Codec
from jdml.communicate.codecs.e3m0 import E3M0, octave
from jdml.communicate.codecs.packing import join_planes, split_planes
from jdml.communicate.codecs.reductions import bits_of, largest

_FORMAT = E3M0()
_BYTES = 8  # those that carry a bit of the scale each, beside two elements
_BITS = np.arange(_BYTES, dtype=np.int32)
_OCTAVES = 5  # of these elements: zero and five powers of two of either sign are 11 levels
_LEVELS = 2 * _OCTAVES + 1  # and 11 × 11 pairs leave one bit of a byte


@dataclasses.dataclass(frozen=True)
class E3M0Row(Codec):
    """See :func:`e3m0_row`."""

    @property
    def granularity(self) -> int:
        return 2 * _BYTES

    def whole(self, length: int) -> int:
        return max(length + length % 2, self.granularity)

    def payload_bytes(self, length: int) -> int:
        return length // 2

    def encode_rows(self, rows: jax.Array, key: jax.Array | None = None) -> jax.Array:
        rows = rows.astype(jnp.float32)
        scale = _FORMAT.of_largest(largest(rows))["exponent"][:, None]
        grid = scale.astype(jnp.int32)
        half = rows.shape[1] // 2
        runs = rows[:, :half], rows[:, half:]
        codes = join_planes([_FORMAT.to_codes(x, grid, None) for x in runs], 4)
        low, high = (_level(x[:, :_BYTES], grid) for x in runs)
        first = low + _LEVELS * high + (((grid >> _BITS) & 1) << 7)
        return jnp.concatenate([first.astype(jnp.uint8), codes[:, _BYTES:]], axis=1)

    def decode_rows(self, payload: jax.Array, length: int) -> jax.Array:
        first = payload[:, :_BYTES].astype(jnp.int32)
        grid = jnp.sum((first >> 7) << _BITS, axis=1, keepdims=True, dtype=jnp.int32)
        pair = first & 127
        levels = [_code(pair % _LEVELS), _code(pair // _LEVELS)]
        codes = jnp.concatenate([join_planes(levels, 4), payload[:, _BYTES:]], axis=1)
        runs = [_FORMAT.from_codes(x, grid) for x in split_planes(codes, 4)]
        return jnp.concatenate(runs, axis=1)


def _level(x: jax.Array, grid: jax.Array) -> jax.Array:
    """0 for zero, 1 to 5 for ``2^(e-4), ..., 2^e``, 6 to 10 for their negatives."""
    power = octave(x, grid, _OCTAVES)
    return jnp.where((power > 0) & (bits_of(x) < 0), power + _OCTAVES, power)


def _code(level: jax.Array) -> jax.Array:
    """What :func:`_level` gave as a code of E3M0, which has two powers more below."""
    negative = level > _OCTAVES
    power = jnp.where(negative, level - _OCTAVES, level)
    return jnp.where(power == 0, 0, power + (7 - _OCTAVES)) | jnp.where(negative, 8, 0)


def e3m0_row() -> E3M0Row:
    """:func:`e3m0` with one scale for a whole row, which is sent inside the codes.

    A row is what one worker says to another, or of a mean: in two phases among K workers a K-th of
    the model, or of 2^20 elements of it. The scale's eight bits need eight places. A byte holds two
    codes; in the first eight bytes of a row these know zero and five powers of two rather than
    seven, ``±2^(e-4), ..., ±2^e``: 11 × 11 pairs, which leaves the byte's last bit to the scale.
    So the row is half a byte an element, exactly.

    Errors as those of :func:`e3m0`, with ``a`` the absolute maximum of the row: ``|error_i| <=
    |x_i| / 3``, or ``a / 96`` where that is more, but for the sixteen elements: there ``a / 24``.
    What is below is said as zero, which :func:`jdml.communicate.error_feedback` pays back. A NaN or
    infinity makes its row NaN.

    One scale reaches seven octaves down from the largest element of all leaves in the row: for
    models whose leaves move alike, as under Adam, and small ones, where a scale per block is a part
    of the message worth saving. Rows are not cut into blocks, which TPU wants of long ones
    (``tiles.py``).

    Bits per element on the wire: 4 (0.125 of f32); a leaf takes an even number, at least 16.

    Reference: Douillard et al., "Streaming DiLoCo", 2025 (outer gradients in E3M0).
    """
    return E3M0Row()
