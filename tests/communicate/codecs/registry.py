"""Every codec with what its docstring promises: add one here and the conformance suite runs it."""

from collections.abc import Callable
from typing import NamedTuple

from jdml.communicate.codecs import Codec, int8


class Case(NamedTuple):
    """A codec and its promises.

    Attributes:
      codec: Small blocks: the suite's rows are short.
      bits: ``length -> bits per element`` of a row of whole blocks, as its docstring has it.
      contraction: ``x -> bound`` on ``||C(x) - x||^2 / ||x||^2`` (on its mean over the keys, for a
        codec that draws) for a row ``x``, f32 NumPy; below 1, or no contraction is claimed.
      unbiased: Whether the mean over the keys is ``x``.
      keeps_scale: Whether values of any size are said equally well, subnormal ones up to half of
        ``2**-149`` each: not true of formats without a scale.
    """

    codec: Codec
    bits: Callable[[int], float]
    contraction: Callable[..., float]
    unbiased: bool = False
    keeps_scale: bool = True


def nearest(levels: int, block: int) -> Callable[..., float]:
    """Rounding to multiples of the block's absolute maximum over ``levels``.

    An error is at most half a step and at most the element, and that of the largest is none: the
    worst block has all others half a step high.
    """
    worst = (block - 1) / (2 * levels) ** 2
    return lambda x: worst / (1 + worst)


CODECS = {
    "int8": Case(int8(16), lambda n: 8 + 32 / 16, nearest(127, 16), keeps_scale=False),
}
