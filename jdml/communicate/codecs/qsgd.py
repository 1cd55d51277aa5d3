"""QSGD: levels of the block's Euclidean norm, drawn so that the mean is right."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from jdml.communicate.codecs.block_codes import BlockCodes, Grid
from jdml.communicate.codecs.checks import check_block
from jdml.communicate.codecs.lifting import Lift, lift, lift_for, lift_one, lower, over
from jdml.communicate.codecs.reductions import largest, total
from jdml.communicate.codecs.rounding import round_to_int


@dataclasses.dataclass(frozen=True)
class Qsgd(BlockCodes):
    """See :func:`qsgd`."""

    levels: int
    block: int = 512

    needs_key: ClassVar[bool] = True  # type: ignore[misc]

    def __post_init__(self) -> None:
        if isinstance(self.levels, bool) or not isinstance(self.levels, int) or self.levels < 1:
            raise ValueError(
                f"qsgd(levels={self.levels!r}): expected a positive int, the number of levels "
                "above zero; 1, 7 and 127 fill codes of 2, 4 and 8 bits."
            )
        if self.levels > 127:
            raise ValueError(
                f"qsgd(levels={self.levels}): expected at most 127, which with their signs fill 8 "
                "bits. Take smaller blocks for less variance."
            )
        check_block("qsgd", self.block)

    @property
    def width(self) -> int:
        return 2 if self.levels == 1 else 4 if self.levels <= 7 else 8

    def measure(self, blocks: jax.Array) -> dict[str, jax.Array]:
        # The root of the mean square: the norm of a block may be more than the largest f32.
        top = largest(blocks)
        by = lift_for(top)
        lifted = lift_one(top, by)
        inverse = over(1, lifted)
        parts = lift(blocks, jax.tree.map(lambda x: x[..., None], by)) * inverse[..., None]
        return {"rms": lower(lifted * jnp.sqrt(total(parts * parts) / self.block), by)}

    def grid(self, scales: dict[str, jax.Array]) -> tuple[Lift, jax.Array, jax.Array]:
        """How blocks are lifted, their norms and the most that f32 holds, both lifted."""
        by = lift_for(scales["rms"])
        most = jnp.where(by.factor < 1, jnp.finfo(jnp.float32).max * 2.0**-100, jnp.inf)
        return by, lift_one(scales["rms"], by) * math.sqrt(self.block), most

    def to_codes(self, x: jax.Array, grid: Grid, noise: jax.Array | None) -> jax.Array:
        assert noise is not None
        by, norm, _ = grid
        steps = lift(x, by) * over(self.levels, norm)
        return round_to_int(jnp.clip(steps + noise, -self.levels, self.levels))

    def from_codes(self, codes: jax.Array, grid: Grid) -> jax.Array:
        by, norm, most = grid
        unused = 8 - self.width
        codes = (codes << unused).astype(jnp.int8) >> unused
        part = codes.astype(jnp.float32) * jnp.float32(1 / self.levels)
        return lower(jnp.clip(part * norm, -most, most), by)


def qsgd(levels: int, block: int = 512) -> Qsgd:
    """``||x|| sgn(x_i) q_i``, ``q_i`` a multiple of ``1 / levels`` beside ``|x_i| / ||x||``.

    Which of the two is drawn so that the mean is right (to 2^-17 of a level): unbiased, with ``E
    ||C(x) - x||^2 <= min(n / levels^2, sqrt(n) / levels) ||x||^2`` for each block of n. Above 1
    that is no contraction: use it without error feedback then, whose residual would grow. Zero
    stays zero. Subnormal numbers are treated like others. What is drawn above the largest f32 is
    decoded as that. A NaN or infinity makes its whole block NaN or infinite.

    The scale that is sent is ``||x|| / sqrt(n)``. The paper codes the levels with Elias codes, of
    which most are short; here every code has the same width, which is what a collective can carry.

    Args:
      levels: Number of levels above zero, 1 to 127.
      block: Number of consecutive elements that share a norm; a *bucket* in the paper.

    Raises:
      ValueError: ``levels`` is not an int from 1 to 127, or ``block`` not a positive int.

    Bits per element on the wire: ``w + 32 / block`` with ``w`` = 2 for one level, 4 for up to 7, 8
    for up to 127 (0.252 of f32 at 127 levels, 0.127 at 7).

    Reference: Alistarh et al., "QSGD: communication-efficient SGD via gradient quantization and
    encoding", NeurIPS 2017.
    """
    return Qsgd(levels, block)
