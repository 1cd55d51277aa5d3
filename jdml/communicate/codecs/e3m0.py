"""4-bit floats of a sign and an exponent: powers of two, scaled for each block."""

import dataclasses

import jax
import jax.numpy as jnp

from jdml.communicate.codecs.block_codes import PartsOfLargest
from jdml.communicate.codecs.checks import check_block
from jdml.communicate.codecs.reductions import SIGN, bits_of, float_of


@dataclasses.dataclass(frozen=True)
class E3M0(PartsOfLargest):
    """See :func:`e3m0`."""

    block: int = 128

    def __post_init__(self) -> None:
        check_block("e3m0", self.block)

    @property
    def fused(self) -> bool:
        return True

    @property
    def width(self) -> int:
        return 4

    def round(self, x: jax.Array, noise: jax.Array | None) -> jax.Array:
        bits = bits_of(x)
        size = bits & ~SIGN
        # Half of the mantissa carries into the exponent from 1.5 times a power of two.
        code = ((size + (1 << 22)) >> 23) - 120
        # Between zero and the smallest power there is but one step, which rounds at its middle.
        code = jnp.where(jnp.abs(x) < 2.0**-7, 0, jnp.clip(code, 1, 7))
        return code | ((bits >> 28) & 8)

    def part(self, codes: jax.Array) -> jax.Array:
        code = codes.astype(jnp.int32)
        power = float_of(((code & 7) + 120) << 23)
        return float_of(bits_of(jnp.where(code & 7 == 0, 0, power)) | ((code & 8) << 28))


def e3m0(block: int = 128) -> E3M0:
    """``x / a`` as 0 or one of ``±2^-6, ±2^-5, ..., ±1``, ``a`` the block's absolute maximum.

    To the nearest, ties away from zero: ``|error_i| <= |x_i| / 3``, or ``a / 128`` where that is
    more. Small elements of a block are said better than by :func:`int4`, large ones worse. What is
    largest in its block, and zero, are decoded bit for bit; subnormal numbers are rounded like
    others, to multiples of 2^-149; the largest f32 overflows nothing. A NaN or infinity makes its
    whole block so.

    Two blocks make one run of bytes, so rows are filled up to ``2 * block``.

    Args:
      block: Number of consecutive elements that share a scale.

    Raises:
      ValueError: ``block`` is not a positive int.

    Bits per element on the wire: ``4 + 32 / block`` (0.133 of f32 at 128), two to a byte.

    Reference: Douillard et al., "Streaming DiLoCo", 2025 (outer gradients in E3M0).
    """
    return E3M0(block)
