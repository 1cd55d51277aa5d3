"""Every codec with what its docstring promises: add one here and the conformance suite runs it."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jdml.communicate.codecs import (
    Codec,
    bf16,
    e3m0,
    e3m0_row,
    fp8,
    identity,
    int2,
    int4,
    int8,
    one_bit,
    qsgd,
    random_k,
    terngrad,
    threshold,
    top_k,
)


class Case(NamedTuple):
    """A codec and its promises.

    Attributes:
      codec: Small blocks: the suite's rows are short.
      bits: ``length -> bits per element`` of a row of whole blocks, as its docstring has it.
      contraction: ``x -> bound`` on ``||C(x) - x||^2 / ||x||^2`` (on its mean over the keys, for a
        codec that draws) for a row ``x``, f32 NumPy; below 1, or no contraction is claimed.
      unbiased: Whether the mean over the keys is ``x``.
      keeps_scale: Whether values of any size are said equally well, but for what ``contraction``
        says of their size, and for half of ``2**-149`` each: not true of formats without a scale.
    """

    codec: Codec
    bits: Callable[[int], float]
    contraction: Callable[..., float]
    unbiased: bool = False
    keeps_scale: bool = True


def nearest(steps: int, block: int) -> Callable[..., float]:
    """Rounding to multiples of the block's absolute maximum over ``steps``.

    An error is at most half a step and at most the element, and that of the largest is none: the
    worst block has all others half a step high.
    """
    worst = (block - 1) / (2 * steps) ** 2
    return lambda x: worst / (1 + worst)


def by_block(square: Callable[..., float], block: int) -> Callable[..., float]:
    """A bound from ``square(|x|, a)``, what an element's squared error is at most.

    ``|x|`` is ``[blocks, block]`` and ``a`` each block's absolute maximum, ``[blocks, 1]``.
    """

    def bound(x):
        size = np.abs(np.asarray(x, np.float64)).reshape(-1, block)
        return np.sum(square(size, size.max(1, keepdims=True))) / (size**2).sum()

    return bound


def stochastic(steps: int, block: int) -> Callable[..., float]:
    """Each element's variance is ``f (1 - f)`` for the fraction ``f`` of a step it is off."""

    def variance(size, largest):
        step = np.where(largest > 0, largest, 1) / steps
        off = size / step % 1
        return off * (1 - off) * step**2

    return by_block(variance, block)


def clipped(deviations: float, block: int) -> Callable[..., float]:
    """TernGrad's variance below where it clips, and what clipping takes off above."""

    def square(size, largest):
        rms = np.sqrt((size**2).mean(1, keepdims=True))
        top = np.minimum(largest, deviations * rms)
        return np.where(size <= top, size * (top - size), (size - top) ** 2)

    return by_block(square, block)


def norm_levels(levels: int, block: int) -> Callable[..., float]:
    """QSGD, Lemma 3.1: the variance bound of each bucket."""
    return lambda x: min(block / levels**2, block**0.5 / levels)


def power_of_two(size, largest):
    """E3M0: a third; above the greatest power all that is more; few below the least."""
    much = np.maximum(size / 3, size - 2.0**127)
    few = np.minimum(size, np.maximum(largest / 96, 2.0**-127))
    return np.maximum(much, few) ** 2


def power_of_two_row(x):
    """E3M0 of a row: the first eight elements of both halves know two octaves fewer."""
    size = np.abs(np.asarray(x, np.float64)).reshape(2, -1)
    reach = np.where(np.arange(size.shape[1]) < 8, size.max() / 24, size.max() / 96)
    return np.sum(power_of_two(size, 96 * reach)) / np.sum(size**2)


def scaled_sign(size, largest):
    """All that is left of a block's square: what its mean absolute value does not explain."""
    return (size**2).sum(1) - size.sum(1) ** 2 / size.shape[1]


def mean_per_sign(block: int) -> Callable[..., float]:
    """The square about the mean of each sign's elements."""

    def left(x):
        blocks = np.asarray(x, np.float64).reshape(-1, block)
        square = (blocks**2).sum()
        for chosen in (np.signbit(blocks), ~np.signbit(blocks)):
            number = np.maximum(chosen.sum(1), 1)
            square -= ((blocks * chosen).sum(1) ** 2 / number).sum()
        return square / (blocks**2).sum()

    return left


def between_ends(steps: int, block: int) -> Callable[..., float]:
    """Half a step from a block's least to its greatest for each element, whichever way it rounds.

    Nearest: never above half a step. Stochastic: a variance of at most a quarter of a step squared.
    """

    def bound(x):
        blocks = np.asarray(x, np.float64).reshape(-1, block)
        width = blocks.max(1) - blocks.min(1)
        return block * ((width / steps / 2) ** 2).sum() / (blocks**2).sum()

    return bound


def low_bytes_and_steps(num_slots: int, num_places: int) -> int:
    """Bits of indices: the lowest 8 of each, the steps of the others in unary, in whole words."""
    return 8 * num_slots + 32 * -(-(num_slots + (num_places - 1) // 256) // 32)


def above(value: float, part: float) -> Callable[..., float]:
    """The part of the square that a threshold leaves, where the largest go first."""

    def left(x):
        square = np.sort(np.asarray(x, np.float64) ** 2)[::-1]
        sent = (square > value**2) & (np.arange(len(square)) < part * len(square))
        return square[~sent].sum() / square.sum()

    return left


CODECS = {
    "int8": Case(int8(16), lambda n: 8 + 32 / 16, nearest(127, 16)),
    "int8, odd block": Case(int8(7), lambda n: 8 + 32 / 7, nearest(127, 7)),
    "int8, two-sided": Case(int8(16, "two_sided"), lambda n: 8 + 64 / 16, between_ends(255, 16)),
    "int8, stochastic": Case(
        int8(16, rounding="stochastic"), lambda n: 8 + 32 / 16, stochastic(127, 16), unbiased=True
    ),
    "int4": Case(int4(), lambda n: 4 + 32 / 128, nearest(7, 128)),
    "int4, block of one": Case(int4(1), lambda n: 4 + 32, nearest(7, 1)),
    "int4, two-sided, stochastic": Case(
        int4(16, "two_sided", "stochastic"),
        lambda n: 4 + 64 / 16,
        between_ends(15, 16),
        unbiased=True,
    ),
    "int2": Case(int2(24), lambda n: 2 + 32 / 24, nearest(1, 24)),
    "int2, two-sided": Case(int2(16, "two_sided"), lambda n: 2 + 64 / 16, between_ends(3, 16)),
    "int2, stochastic": Case(
        int2(16, rounding="stochastic"), lambda n: 2 + 32 / 16, stochastic(1, 16), unbiased=True
    ),
    "fp8": Case(
        fp8(block=16),
        lambda n: 8 + 32 / 16,
        by_block(lambda x, a: np.maximum(x / 2**4, a * 2**-10 / 448) ** 2, 16),
    ),
    "fp8, e5m2": Case(
        fp8("e5m2", block=16),
        lambda n: 8 + 32 / 16,
        by_block(lambda x, a: np.maximum(x / 2**3, a * 2**-17 / 57344) ** 2, 16),
    ),
    "e3m0": Case(e3m0(16), lambda n: 4 + 8 / 16, by_block(power_of_two, 16)),
    "e3m0_row": Case(e3m0_row(), lambda n: 4, power_of_two_row),
    "one_bit": Case(one_bit(64), lambda n: 1 + 32 / 64, by_block(scaled_sign, 64)),
    "one_bit, mean per sign": Case(
        one_bit(64, "mean_per_sign"), lambda n: 1 + 64 / 64, mean_per_sign(64)
    ),
    "terngrad": Case(terngrad(32), lambda n: 2 + 32 / 32, stochastic(1, 32), unbiased=True),
    "terngrad, clipped": Case(terngrad(32, 1.5), lambda n: 2 + 32 / 32, clipped(1.5, 32)),
    "qsgd": Case(qsgd(7, 16), lambda n: 4 + 32 / 16, norm_levels(7, 16), unbiased=True),
    "qsgd, one level": Case(qsgd(1, 64), lambda n: 2 + 32 / 64, norm_levels(1, 64), unbiased=True),
    "qsgd, most levels": Case(qsgd(127), lambda n: 8 + 32 / 512, norm_levels(127, 512)),
    "bf16": Case(bf16(), lambda n: 16, lambda x: 2.0**-16, keeps_scale=False),
    "identity": Case(identity(), lambda n: 32, lambda x: 0),
    "top_k": Case(
        top_k(1 / 16), lambda n: 32 / 16 + low_bytes_and_steps(n // 16, n) / n, lambda x: 15 / 16
    ),
    "top_k of blocks, in int8": Case(
        top_k(4, int8(4), block=64),
        lambda n: (8 + 32 / 4) / 16 + low_bytes_and_steps(n // 16, n) / n,
        lambda x: 15 / 16 + nearest(127, 4)(x),
    ),
    "threshold": Case(
        threshold(1.0, 1 / 4), lambda n: 32 / 4 + 1, above(1.0, 1 / 4), keeps_scale=False
    ),
    "random_k": Case(random_k(1 / 4), lambda n: 32 / 4 + 64 / n, lambda x: 3 / 4),
    "random_k, unbiased": Case(
        random_k(1 / 4, unbiased=True), lambda n: 32 / 4 + 64 / n, lambda x: 3, unbiased=True
    ),
}
