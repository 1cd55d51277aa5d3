"""4-bit floats of a sign and an exponent: powers of two, from a window that each block places."""

import dataclasses

import jax
import jax.numpy as jnp

from jdml.communicate.codecs.block_codes import Grid
from jdml.communicate.codecs.checks import check_block
from jdml.communicate.codecs.reductions import bits_of, float_of, largest, magnitude
from jdml.communicate.codecs.short_rows import ShortRows

_HALF = 1 << 22  # half of the mantissa: added, it carries into the exponent from 1.5 upwards
_NOT_A_NUMBER = 255
_GREATEST = 254  # 2^127: f32 has no greater power
_LEAST = 7  # 2^-120: the least power of its window is the least normal number


@dataclasses.dataclass(frozen=True)
class E3M0(ShortRows):
    """See :func:`e3m0`."""

    block: int = 512

    def __post_init__(self) -> None:
        check_block("e3m0", self.block)

    @property
    def fused(self) -> bool:
        return True

    @property
    def width(self) -> int:
        return 4

    @property
    def scale_bytes(self) -> int:
        return 1

    def measure(self, blocks: jax.Array) -> dict[str, jax.Array]:
        return self.of_largest(largest(blocks))

    def of_largest(self, top: jax.Array) -> dict[str, jax.Array]:
        bits = magnitude(top)
        exponent = jnp.clip((bits + _HALF) >> 23, _LEAST, _GREATEST)
        finite = bits < _NOT_A_NUMBER << 23
        return {"exponent": jnp.where(finite, exponent, _NOT_A_NUMBER).astype(jnp.uint8)}

    def grid(self, scales: dict[str, jax.Array]) -> jax.Array:
        return scales["exponent"].astype(jnp.int32)

    def to_codes(self, x: jax.Array, grid: Grid, noise: jax.Array | None) -> jax.Array:
        return octave(x, grid, 7) | ((bits_of(x) >> 28) & 8)

    def from_codes(self, codes: jax.Array, grid: Grid) -> jax.Array:
        # 0 × NaN is NaN: what was not finite stays so.
        scale = float_of(jnp.where(grid == _NOT_A_NUMBER, 0x7FC00000, grid << 23))
        code = codes.astype(jnp.int32)
        power = jnp.where(code & 7 == 0, 0, ((code & 7) + 120) << 23)
        return float_of(power | ((code & 8) << 28)) * scale


def octave(x: jax.Array, grid: Grid, num: int) -> jax.Array:
    """0 for zero, or ``k`` from 1 to ``num`` for ``2^(e - num + k)``, the nearest to ``|x|``."""
    # Of integers throughout: what is subnormal is read alike everywhere.
    size = magnitude(x)
    code = jnp.clip(((size + _HALF) >> 23) - grid + num, 1, num)
    # Between zero and the least power there is but one step, which rounds at its middle.
    middle = jnp.maximum((grid - num) << 23, _HALF)
    return jnp.where(size < middle, 0, code)


def e3m0(block: int = 512) -> E3M0:
    """Zero or the nearest power of two ``±2^(e-6), ..., ±2^e``; ``2^e`` nearest to the block's top.

    What a block sends besides its codes is ``e`` alone, in one byte, ``e + 127``: the scale E8M0 of
    the OCP formats. A scale that is a power of two moves no element within its octave, so a larger
    block costs nothing but reach: seven octaves down from its absolute maximum ``a``.

    To the nearest, ties away from zero: ``|error_i| <= |x_i| / 3``, or ``2^(e-7) <= a / 96`` where
    that is more. ``e`` is ``log2 a``, rounded where elements are, up from 1.5 times a power of two,
    and held between -120 and 127: above 1.5 × 2^127 numbers are said as 2^127, so that the largest
    f32 overflows nothing, and below 2^-127 as zero: subnormal numbers are, or are 2^-126. Powers of
    two within reach, and zero, are decoded bit for bit. A NaN or infinity makes its block NaN, for
    which E8M0 keeps the byte 255.

    Rows are filled up to whole blocks, two of them to a run of bytes, where that adds at most
    1/512; shorter ones end in short blocks, so that a small model says no more than it holds. Then
    a block may hold the end of one leaf and the beginning of the next. What is 2^-8 of its
    neighbours says nothing there but through :func:`jdml.communicate.error_feedback`.
    :func:`e3m0_row` has one scale for a whole message, which costs nothing.

    Args:
      block: Number of consecutive elements that share a scale.

    Raises:
      ValueError: ``block`` is not a positive int.

    Bits per element on the wire: ``4 + 8 / block`` (0.1255 of f32 at 512), two to a byte; of a row
    of ``n`` in short blocks ``4 n + 16 ceil(n / (2 block))`` in all.

    Reference: Douillard et al., "Streaming DiLoCo", 2025 (outer gradients in E3M0); Open Compute
    Project, "Microscaling Formats (MX) Specification", 2023 (E8M0).
    """
    return E3M0(block)
