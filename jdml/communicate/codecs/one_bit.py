"""One bit per element: its sign, and one or two magnitudes for each block."""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from jdml.communicate.codecs.block_codes import BlockCodes, Grid
from jdml.communicate.codecs.checks import check_block, check_choice
from jdml.communicate.codecs.lifting import lift, lift_for, lower
from jdml.communicate.codecs.reductions import bits_of, float_of, largest, total

SCALES = ("mean", "mean_per_sign")


@dataclasses.dataclass(frozen=True)
class OneBit(BlockCodes):
    """See :func:`one_bit`."""

    block: int = 1024
    scale: str = "mean"

    fill: ClassVar[Literal["zeros", "wrap"]] = "wrap"
    lines_per_block: ClassVar[int] = 8

    def __post_init__(self) -> None:
        check_block("one_bit", self.block, multiple_of=8)
        check_choice("one_bit", "scale", self.scale, SCALES)

    @property
    def width(self) -> int:
        return 1

    @property
    def scale_bytes(self) -> int:
        return 4 if self.scale == "mean" else 8

    def measure(self, blocks: jax.Array) -> dict[str, jax.Array]:
        # Lifted, the largest lies between 2^-80 and 2^80: no sum overflows, and none that counts is
        # lost below 2^-126.
        top = largest(blocks)
        by = lift_for(top)
        lifted = lift(blocks, jax.tree.map(lambda x: x[..., None], by))
        if self.scale == "mean":
            return {"mean": lower(total(jnp.abs(lifted)) / self.block, by)}
        num_negative = total((bits_of(blocks) >> 31) & 1)
        negative = total(jnp.minimum(lifted, 0)) / jnp.maximum(num_negative, 1)
        positive = total(jnp.maximum(lifted, 0)) / jnp.maximum(self.block - num_negative, 1)
        nothing = top - top  # or NaN, for both halves of a block with an infinity
        return {
            "negative": lower(negative + nothing, by),
            "positive": lower(positive + nothing, by),
        }

    def grid(self, scales: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return scales

    def to_codes(self, x: jax.Array, grid: Grid, noise: jax.Array | None) -> jax.Array:
        return bits_of(x) >> 31

    def from_codes(self, codes: jax.Array, grid: Grid) -> jax.Array:
        if self.scale == "mean":
            # Bits are joined, not numbers multiplied: exact for subnormal ones.
            return float_of(bits_of(grid["mean"]) | (codes.astype(jnp.int32) << 31))
        return jnp.where(codes == 0, grid["positive"], grid["negative"])


def one_bit(block: int = 1024, scale: str = "mean") -> OneBit:
    """``s sgn(x_i)`` with ``s = ||x||_1 / n``, for each block of n elements.

    Scaled so, signs are a contraction: ``||C(x) - x||^2 = (1 - ||x||_1^2 / (n ||x||_2^2)) ||x||^2``
    exactly, at most ``1 - 1 / n``, and about 0.36 for Gaussian elements. Biased: use it with
    :func:`jdml.communicate.error_feedback`. A zero takes the sign of its bits; a block of zeros is
    exact. The mean of subnormal numbers is one, to the nearest multiple of 2^-149; that of the
    largest f32 overflows nothing. A NaN or infinity makes its whole block so.

    Args:
      block: Number of consecutive elements that share a scale; a multiple of 8, of 1024 for whole
        TPU lanes.
      scale: ``"mean"``; or ``"mean_per_sign"``: the mean of the elements that are at least zero and
        the mean of those below, which of all pairs of values errs least.

    Raises:
      ValueError: ``block`` is not a positive multiple of 8, or ``scale`` is unknown.

    Bits per element on the wire: ``1 + 32 / block`` (0.0322 of f32 at 1024), eight to a byte; with
    a mean per sign ``1 + 64 / block`` (0.0332).

    Reference: Karimireddy et al., "Error feedback fixes SignSGD", ICML 2019 (scaled sign); Seide et
    al., "1-bit stochastic gradient descent", Interspeech 2014 (mean per sign, of a column there).
    """
    return OneBit(block, scale)
