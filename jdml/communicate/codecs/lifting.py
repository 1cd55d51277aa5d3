"""Blocks of any magnitude, brought to where f32 arithmetic holds, and back.

XLA on CPU and TPU reads subnormal numbers (below 2^-126) as zeros and writes zeros for them, and a
sum or difference of the largest overflows. So a codec computes on ``x * factor``, with one power of
two for each block, which is exact: :func:`lift` reads subnormal numbers off their integer bits, and
:func:`lower` writes them as integers. Blocks of ordinary size have the factor 1. The
largest of a block, lifted, lies between 2^-80 and 2^80, or is zero.

What comes out does not depend on whether a device flushes subnormal numbers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdml.communicate.codecs.reductions import SIGN, bits_of, float_of, magnitude

_SMALLEST_NORMAL = 1 << 23  # bits of 2^-126; as an integer below it, a number counts 2^-149s
_TINY = 47 << 23  # bits of 2^-80
_HUGE = 207 << 23  # bits of 2^80
_INFINITE = 255 << 23


class Lift(NamedTuple):
    """How blocks are lifted: four f32 numbers for each.

    Attributes:
      factor: The power of two by which a block is multiplied: 2^100, 1 or 2^-100.
      inverse: Its inverse.
      unit: ``factor * 2^-149`` where subnormal numbers count, else 0.
      limit: ``factor * 2^-126`` where subnormal numbers count, else 0.
    """

    factor: jax.Array
    inverse: jax.Array
    unit: jax.Array
    limit: jax.Array


def lift_for(largest: jax.Array) -> Lift:
    """How to lift blocks of this absolute maximum."""
    bits = magnitude(largest)
    small, huge = bits < _TINY, (bits >= _HUGE) & (bits < _INFINITE)

    def one_over(if_small: float, if_huge: float, otherwise: float) -> jax.Array:
        value = jnp.where(huge, jnp.float32(if_huge), jnp.float32(otherwise))
        # A quotient, because XLA computes quotients once for each block. What it takes to be cheap
        # it computes again for each element, in the loop over them.
        return 1 / jnp.where(small, jnp.float32(if_small), value)

    never = float("inf")
    return Lift(
        one_over(2.0**-100, 2.0**100, 1),
        one_over(2.0**100, 2.0**-100, 1),
        one_over(2.0**49, never, never),
        one_over(2.0**26, never, never),
    )


def lift(x: jax.Array, by: Lift) -> jax.Array:
    """``x * factor``, exact down to 2^-40 of a block's largest, and zero somewhere below."""
    return jnp.where(_is_subnormal(x), _count(x) * by.unit, x * by.factor)


def lift_one(x: jax.Array, by: Lift) -> jax.Array:
    """:func:`lift` of one number for each block; a quotient, see :func:`lift_for`."""
    few = _is_subnormal(x)
    return jnp.where(few, _count(x), x) / jnp.where(few, 1 / by.unit, by.inverse)


def lower(y: jax.Array, by: Lift) -> jax.Array:
    """``y / factor``, to the nearest multiple of 2^-149 where that is what f32 has."""
    size = jnp.abs(y)
    one = jnp.float32(2.0**23)  # at this size the last bit is worth one
    count = bits_of(size * jnp.float32(2.0**49) + one) - bits_of(one)
    subnormal = float_of(count | (bits_of(y) & SIGN))
    return jnp.where(size < by.limit, subnormal, y * by.inverse)


def over(top: float, x: jax.Array) -> jax.Array:
    """``top / x``, and 0 for ``x = 0``."""
    return jnp.where(x == 0, 0, top / jnp.where(x == 0, 1, x))


def _is_subnormal(x: jax.Array) -> jax.Array:
    return magnitude(x) < _SMALLEST_NORMAL


def _count(x: jax.Array) -> jax.Array:
    """A subnormal number over 2^-149."""
    return float_of(bits_of(magnitude(x).astype(jnp.float32)) | (bits_of(x) & SIGN))
