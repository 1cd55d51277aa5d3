"""8-bit floats, scaled for each block."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdml.communicate.codecs.block_codes import PartsOfLargest
from jdml.communicate.codecs.checks import check_block, check_choice
from jdml.communicate.codecs.reductions import SIGN, bits_of, float_of


class _Format(NamedTuple):
    mantissa: int
    bias: int
    largest: float


_FORMATS = {"e4m3": _Format(3, 7, 448.0), "e5m2": _Format(2, 15, 57344.0)}


@dataclasses.dataclass(frozen=True)
class Fp8(PartsOfLargest):
    """See :func:`fp8`."""

    format: str = "e4m3"
    block: int = 256

    def __post_init__(self) -> None:
        check_choice("fp8", "format", self.format, _FORMATS)
        check_block("fp8", self.block)

    @property
    def fused(self) -> bool:
        return True

    @property
    def width(self) -> int:
        return 8

    @property
    def top(self) -> float:  # type: ignore[override]
        return _FORMATS[self.format].largest

    def round(self, x: jax.Array, noise: jax.Array | None) -> jax.Array:
        mantissa, bias, _ = _FORMATS[self.format]
        bits = bits_of(x)
        size = bits & ~SIGN
        cut = 23 - mantissa
        # Half of the last place that stays, less one bit where that place is even: ties to even.
        rounded = (size + ((1 << (cut - 1)) - 1) + ((size >> cut) & 1)) >> cut
        normal = rounded - ((127 - bias) << mantissa)
        # Below its smallest normal number the format counts steps: a float of which the last bit is
        # worth one step counts them too.
        one = jnp.float32(2.0 ** (1 - bias - mantissa + 23))
        few = bits_of(jnp.abs(x) + one) - bits_of(one)
        code = jnp.where(jnp.abs(x) < 2.0 ** (1 - bias), few, normal)
        return code | ((bits >> 24) & 0x80)

    def part(self, codes: jax.Array) -> jax.Array:
        mantissa, bias, largest = _FORMATS[self.format]
        code = codes.astype(jnp.int32)
        size = code & 0x7F
        normal = float_of((size << (23 - mantissa)) + ((127 - bias) << 23))
        few = size.astype(jnp.float32) * jnp.float32(2.0 ** (1 - bias - mantissa))
        value = jnp.where(size < 1 << mantissa, few, normal) * jnp.float32(1 / largest)
        return float_of(bits_of(value) | ((code & 0x80) << 24))


def fp8(format: str = "e4m3", block: int = 256) -> Fp8:
    """``x * t / a`` as an 8-bit float, ``a`` the block's absolute maximum, ``t`` the format's.

    Small elements of a block keep their leading digits, which :func:`int8` does not: ``|error_i| <=
    2^-(m + 1) |x_i|`` with m bits of mantissa, or half of the format's smallest number, which is
    ``2^-9 a / 448`` (e4m3, m = 3) or ``2^-16 a / 57344`` (e5m2, m = 2), where that is more. Rounded
    to nearest, ties to even; the same bits as a conversion of the scaled number, which XLA's CPU
    code is slow at. What is largest in its block, and zero, are decoded bit for bit; subnormal
    numbers are rounded like others, to multiples of 2^-149; the largest f32 overflows nothing. A
    NaN or infinity makes its whole block so.

    Args:
      format: ``"e4m3"`` (the variant without infinity, to 448) or ``"e5m2"`` (to 57344).
      block: Number of consecutive elements that share a scale.

    Raises:
      ValueError: ``format`` is unknown, or ``block`` is not a positive int.

    Bits per element on the wire: ``8 + 32 / block`` (0.254 of f32 at 256), as ``uint8``.

    Reference: Micikevicius et al., "FP8 formats for deep learning", 2022 (formats); scaled by
    blocks as :func:`int8`.
    """
    return Fp8(format, block)
