"""Formats without a scale: f32 as it is, and its upper half."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jdml.communicate.codecs.base import Codec
from jdml.communicate.codecs.reductions import SIGN, bits_of, float_of

_INFINITE = 255 << 23


@dataclasses.dataclass(frozen=True)
class Identity(Codec):
    """See :func:`identity`."""

    elementwise: ClassVar[bool] = True

    @property
    def granularity(self) -> int:
        return 1

    def encode_rows(self, rows: jax.Array, key: jax.Array | None = None) -> jax.Array:
        return rows.astype(jnp.float32)

    def decode_rows(self, payload: jax.Array, length: int) -> jax.Array:
        return payload

    def payload_bytes(self, length: int) -> int:
        return 4 * length


@dataclasses.dataclass(frozen=True)
class Bf16(Codec):
    """See :func:`bf16`."""

    elementwise: ClassVar[bool] = True

    @property
    def granularity(self) -> int:
        return 1

    def encode_rows(self, rows: jax.Array, key: jax.Array | None = None) -> jax.Array:
        bits = bits_of(rows.astype(jnp.float32))
        size = bits & ~SIGN
        rounded = (size + 0x7FFF + ((size >> 16) & 1)) >> 16
        finite = jnp.minimum(rounded, 0x7F7F)
        # A bit of NaN's that stays when the lower half is gone.
        other = jnp.where(size == _INFINITE, rounded, 0x7FC0)
        code = jnp.where(size < _INFINITE, finite, other) | ((bits >> 16) & 0x8000)
        return code.astype(jnp.uint16)

    def decode_rows(self, payload: jax.Array, length: int) -> jax.Array:
        return float_of(payload.astype(jnp.int32) << 16)

    def payload_bytes(self, length: int) -> int:
        return 2 * length


def identity() -> Identity:
    """f32, every bit of it: a collective's reference, and what its own arithmetic costs.

    Bits per element on the wire: 32.
    """
    return Identity()


def bf16() -> Bf16:
    """The nearest bfloat16, ties to even: ``|error_i| <= 2^-8 |x_i|`` for normal numbers.

    Infinity and NaN are sent as such; what is finite stays finite (above the largest bfloat16 it is
    sent as that, where a conversion makes infinity); subnormal numbers are rounded to multiples of
    2^-133. Sent as ``uint16``: XLA's collectives on CPU widen bfloat16 to 32 bits.

    Bits per element on the wire: 16.

    Reference: Kalamkar et al., "A study of BFLOAT16 for deep learning training", 2019.
    """
    return Bf16()
