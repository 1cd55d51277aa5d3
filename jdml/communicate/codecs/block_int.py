"""Block-wise integers of 8, 4 or 2 bits: one or two f32 scales per block of elements."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jdml.communicate.codecs import reductions
from jdml.communicate.codecs.block_codes import BlockCodes
from jdml.communicate.codecs.checks import check_block, check_choice
from jdml.communicate.codecs.lifting import Lift, lift, lift_for, lift_one, lower, over
from jdml.communicate.codecs.rounding import round_to_int

SCALINGS = ("absmax", "two_sided")
ROUNDINGS = ("nearest", "stochastic")


@dataclasses.dataclass(frozen=True)
class BlockInt(BlockCodes):
    """See :func:`int8`, :func:`int4` and :func:`int2`."""

    bits: int
    block: int
    scaling: str = "absmax"
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        name = f"int{self.bits}"
        check_block(name, self.block)
        check_choice(name, "scaling", self.scaling, SCALINGS)
        check_choice(name, "rounding", self.rounding, ROUNDINGS)

    @property
    def needs_key(self) -> bool:  # type: ignore[override]
        return self.rounding == "stochastic"

    @property
    def width(self) -> int:
        return self.bits

    @property
    def fused(self) -> bool:
        return self.scaling == "absmax" and self.rounding == "nearest"

    @property
    def scale_bytes(self) -> int:
        return 4 if self.scaling == "absmax" else 8

    @property
    def num_steps(self) -> int:
        """From zero to the largest, or from the low end to the high one."""
        # Symmetric: -128 is not used, so that decode(encode(-x)) = -decode(encode(x)).
        return 2 ** (self.bits - 1) - 1 if self.scaling == "absmax" else 2**self.bits - 1

    def measure(self, blocks: jax.Array) -> dict[str, jax.Array]:
        if self.scaling == "absmax":
            return {"largest": reductions.largest(blocks)}
        low, high = reductions.ends(blocks)
        return {"low": low, "high": high}

    def grid(self, scales: dict[str, jax.Array]) -> tuple[Lift, jax.Array | None, jax.Array]:
        """How blocks are lifted, and their ends, lifted; a symmetric block has no low end."""
        if self.scaling == "absmax":
            by = lift_for(scales["largest"])
            return by, None, lift_one(scales["largest"], by)
        by = lift_for(reductions.larger(scales["low"], scales["high"]))
        return by, lift_one(scales["low"], by), lift_one(scales["high"], by)

    def to_codes(self, x: jax.Array, grid: Any, noise: jax.Array | None) -> jax.Array:
        by, low, high = grid
        if low is None:
            steps = lift(x, by) * over(self.num_steps, high)
        else:
            steps = (lift(x, by) - low) * over(self.num_steps, high - low)
        if noise is not None:
            least = -self.num_steps if low is None else 0
            steps = jnp.clip(steps + noise, least, self.num_steps)
        return round_to_int(steps)

    def from_codes(self, codes: jax.Array, grid: Any) -> jax.Array:
        by, low, high = grid
        if low is None:
            unused = 8 - self.bits
            codes = (codes << unused).astype(jnp.int8) >> unused
        # The last step is 1 exactly, for each of these numbers of steps: the ends are decoded as
        # they were. 0 × NaN and 0 × ∞ are NaN: what was not finite stays so.
        part = codes.astype(jnp.float32) * jnp.float32(1 / self.num_steps)
        # Between two products a bound that nothing passes: XLA would multiply their constants first
        # (seen in jax 0.10.2), and the last step would be off by a rounding.
        if low is None:
            return lower(jnp.maximum(part, -1) * high, by)
        part = jnp.minimum(part, 1)
        # Rounding must not pass the ends, one of which may be the largest f32.
        return lower(jnp.clip(low * (1 - part) + high * part, low, high), by)


def int8(block: int = 256, scaling: str = "absmax", rounding: str = "nearest") -> BlockInt:
    """Block-wise int8: ``q = round(127 x / a)``, ``a`` the block's absolute maximum.

    ``|decode(q)_i - x_i| <= a / 254``, besides f32 rounding. So a round trip of ``n`` elements is a
    contraction: ``||C(x) - x||^2 <= c / (1 + c) ||x||^2`` with ``c = (n - 1) / 254^2`` in a block.
    What is largest in its block, and zero, are decoded bit for bit. All this holds for subnormal
    numbers too, to the nearest multiple of 2^-149; blocks below ``127 * 2^-149`` are exact, and
    the largest f32 overflows nothing. A NaN or infinity makes its whole block so (NaN or infinite).

    Args:
      block: Number of consecutive elements that share a scale.
      scaling: ``"absmax"``, levels symmetric about zero. ``"two_sided"``, 256 levels from the
        block's least element to its greatest, both exact: ``|error| <= (max - min) / 510``, for
        blocks that are not centred on zero. A constant block is exact, zero among others is not.
      rounding: ``"nearest"``, or ``"stochastic"``: up with the probability that makes the mean
        right, to 2^-17 of a level; needs a key. ``E error_i^2 <= (a / 254)^2``.

    Raises:
      ValueError: ``block`` is not a positive int, or an option is unknown.

    Bits per element on the wire: ``8 + 32 / block`` (0.254 of f32 at 256); two-sided ``8 + 64 /
    block``.

    Reference: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", ICLR 2022
    (block-wise absolute-maximum scaling; here with linear levels).
    """
    return BlockInt(8, block, scaling, rounding)


def int4(block: int = 128, scaling: str = "absmax", rounding: str = "nearest") -> BlockInt:
    """:func:`int8` with seven levels a side: ``|error| <= a / 14``; two-sided ``(max - min) / 30``.

    Two blocks make one run of bytes, so rows are filled up to ``2 * block``.

    Bits per element on the wire: ``4 + 32 / block`` (0.133 of f32 at 128); two-sided ``4 + 64 /
    block``.
    """
    return BlockInt(4, block, scaling, rounding)


def int2(block: int = 128, scaling: str = "absmax", rounding: str = "nearest") -> BlockInt:
    """:func:`int8` with the levels -a, 0, a: ``|error| <= a / 2``; two-sided ``(max - min) / 6``.

    Four blocks make one run of bytes, so rows are filled up to ``4 * block``. Two-sided has four
    levels, but zero may not be one of them.

    Bits per element on the wire: ``2 + 32 / block`` (0.070 of f32 at 128); two-sided ``2 + 64 /
    block``.
    """
    return BlockInt(2, block, scaling, rounding)
