"""TernGrad: -s, 0 or s, drawn so that the mean is right."""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from jdml.communicate.codecs.block_codes import PartsOfLargest
from jdml.communicate.codecs.checks import check_block
from jdml.communicate.codecs.lifting import lift, lift_for, lift_one, lower, over
from jdml.communicate.codecs.reductions import largest, total
from jdml.communicate.codecs.rounding import round_to_int


@dataclasses.dataclass(frozen=True)
class TernGrad(PartsOfLargest):
    """See :func:`terngrad`."""

    block: int = 512
    clip: float | None = None

    needs_key: ClassVar[bool] = True  # type: ignore[misc]
    fill: ClassVar[Literal["zeros", "wrap"]] = "wrap"  # zeros would lower where it clips

    def __post_init__(self) -> None:
        check_block("terngrad", self.block)
        number = isinstance(self.clip, (int, float)) and not isinstance(self.clip, bool)
        if self.clip is not None and not (number and 1 <= self.clip < float("inf")):
            raise ValueError(
                f"terngrad(clip={self.clip!r}): expected None, or a number of deviations that is "
                "at least 1, such as 2.5."
            )

    @property
    def width(self) -> int:
        return 2

    def measure(self, blocks: jax.Array) -> dict[str, jax.Array]:
        top = largest(blocks)
        if self.clip is not None:
            by = lift_for(top)
            lifted = lift_one(top, by)
            inverse = over(1, lifted)
            parts = lift(blocks, jax.tree.map(lambda x: x[..., None], by)) * inverse[..., None]
            deviation = jnp.sqrt(total(parts * parts) / self.block)
            top = lower(lifted * jnp.minimum(self.clip * deviation, 1), by)
        return {"largest": top}

    def round(self, x: jax.Array, noise: jax.Array | None) -> jax.Array:
        assert noise is not None
        return round_to_int(jnp.clip(x + noise, -1, 1))

    def part(self, codes: jax.Array) -> jax.Array:
        return ((codes << 6).astype(jnp.int8) >> 6).astype(jnp.float32)


def terngrad(block: int = 512, clip: float | None = None) -> TernGrad:
    """``s sgn(x_i) b_i`` with ``P(b_i = 1) = |x_i| / s``, ``s`` the block's absolute maximum.

    Unbiased (the probability is right to 2^-23), with ``E ||C(x) - x||^2 = s ||x||_1 - ||x||^2`` in
    a block: seldom a contraction, so use it without error feedback, whose residual would grow. Zero
    stays zero. Subnormal numbers are treated like others; the largest f32 overflows nothing. A NaN
    or infinity makes its whole block so.

    Args:
      block: Number of consecutive elements that share ``s``; a whole layer in the paper.
      clip: ``None``, or a number c: elements beyond c standard deviations, measured from zero in
        each block, are clipped to that first, which lowers ``s`` and so the variance, at the price
        of a bias; 2.5 in the paper.

    Raises:
      ValueError: ``block`` is not a positive int, or ``clip`` is below 1.

    Bits per element on the wire: ``2 + 32 / block`` (0.0645 of f32 at 512), four to a byte. (Three
    values hold 1.58 bits; packing them tighter takes divisions.)

    Reference: Wen et al., "TernGrad: ternary gradients to reduce communication in distributed deep
    learning", NeurIPS 2017.
    """
    return TernGrad(block, clip)
