"""What codecs share that send a few numbers for each block and a short code for each element."""

import abc
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jdml.communicate.codecs import draws
from jdml.communicate.codecs.base import Codec, sum_rows
from jdml.communicate.codecs.lifting import Lift, lift, lift_for, lift_one, lower, over
from jdml.communicate.codecs.packing import cut, join_planes, split_planes
from jdml.communicate.codecs.reductions import largest
from jdml.communicate.kernels import blocks as kernel
from jdml.communicate.kernels.here import kernels_run_here

Grid = Any
"""A pytree of f32 arrays, one number for each block: how its codes are read."""


class BlockCodes(Codec):
    """Codes of 2, 4 or 8 bits on a grid that each block measures for itself.

    Codes narrower than a byte share one in planes: with ``p`` of them to a byte, a row is cut into
    ``p`` runs of whole blocks, and a byte holds one code of each run.

    XLA's CPU code is one loop in each direction, of vector instructions, as long as two rules hold:
    runs are cut before anything is computed, so that each is read from front to back; and arrays
    keep the shape ``[rows, blocks, block]`` to the end. Seen through a reshape or a late cut, the
    same arithmetic was measured ten times slower.
    """

    block: int
    lines_per_block: ClassVar[int] = 1
    """A codec with large blocks cuts them into lines, and runs need only be whole lines."""

    @property
    @abc.abstractmethod
    def width(self) -> int:
        """Bits of a code: 1, 2, 4 or 8."""

    @property
    def scale_bytes(self) -> int:
        """Bytes of what a block sends besides its codes."""
        return 4

    @abc.abstractmethod
    def measure(self, blocks: jax.Array) -> dict[str, jax.Array]:
        """What each of ``[rows, blocks, block]`` sends besides its codes: ``[rows, blocks]`` each.

        Not finite if an element is not.
        """

    @abc.abstractmethod
    def grid(self, scales: dict[str, jax.Array]) -> Grid:
        """What encoding and decoding need of each block; the receiver computes it too."""

    @abc.abstractmethod
    def to_codes(self, x: jax.Array, grid: Grid, noise: jax.Array | None) -> jax.Array:
        """Integers whose low ``width`` bits are the codes; ``noise``: uniform in [-1/2, 1/2)."""

    @abc.abstractmethod
    def from_codes(self, codes: jax.Array, grid: Grid) -> jax.Array:
        """The f32 that ``uint8`` codes stand for; not finite where the scales are not."""

    @property
    def fused(self) -> bool:
        """Whether the TPU kernel may encode.

        What a block sends is made of its absolute maximum (``of_largest``); nothing is drawn; a
        block is one line; and ``of_largest``, ``grid`` and ``to_codes`` are elementwise, of f32 and
        int32 arithmetic.
        """
        return False

    def of_largest(self, top: jax.Array) -> dict[str, jax.Array]:
        """What :meth:`measure` gives, of a codec that is ``fused``, from the absolute maxima."""
        return {"largest": top}

    def _codes_of(self, x: jax.Array, top: jax.Array) -> jax.Array:
        return self.to_codes(x, self.grid(self.of_largest(top)), None)

    @property
    def granularity(self) -> int:
        return self.block * (8 // self.width) // self.lines_per_block

    def encode_rows(self, rows: jax.Array, key: jax.Array | None = None) -> dict[str, jax.Array]:
        rows = rows.astype(jnp.float32)
        shape = (rows.shape[0], rows.shape[1] // self.block, self.block)
        blocks = rows.reshape(shape)
        if self.fused and kernels_run_here() and kernel.fits(shape, self.width):
            codes, top = kernel.encode_blocks(blocks, self.width, self._codes_of)
            return {"codes": codes, **self.of_largest(top)}
        scales = self.measure(blocks)
        lines = rows.reshape(rows.shape[0], -1, self.block // self.lines_per_block)
        runs = cut((lines, self._grid_of_lines(scales)), 8 // self.width)
        noise: Sequence[jax.Array | None] = [None] * len(runs)
        if self.needs_key:
            assert key is not None
            noise = draws.uniform(key, lines.shape, len(runs))
        planes = [self.to_codes(x, g, u) for (x, g), u in zip(runs, noise, strict=True)]
        return {"codes": join_planes(planes, self.width), **scales}

    def decode_rows(self, payload: dict[str, jax.Array], length: int) -> jax.Array:
        return jnp.concatenate(self._decode_runs(payload), axis=1).reshape(-1, length)

    def decode_sum(self, payload: dict[str, jax.Array], length: int, divisor: int = 1) -> jax.Array:
        total = self._sum(payload, length)
        return total if divisor == 1 else total / divisor

    def _sum(self, payload: dict[str, jax.Array], length: int) -> jax.Array:
        num_rows = payload["codes"].shape[0]
        if num_rows > 32:
            return sum_rows(self.decode_rows(payload, length))
        # Cut into rows before decoding, see above; and added run by run.
        rows = [jax.tree.map(lambda x, k=k: x[k : k + 1], payload) for k in range(num_rows)]
        runs = [self._decode_runs(row) for row in rows]
        totals = [sum(run[1:], run[0]) for run in zip(*runs, strict=True)]
        return jnp.concatenate(totals, axis=1).reshape(length)

    def _decode_runs(self, payload: dict[str, jax.Array]) -> list[jax.Array]:
        scales = {name: x for name, x in payload.items() if name != "codes"}
        grid = self._grid_of_lines(scales)
        codes = split_planes(payload["codes"], self.width)
        return [self.from_codes(c, g) for c, g in zip(codes, cut(grid, len(codes)), strict=True)]

    def _grid_of_lines(self, scales: dict[str, jax.Array]) -> Grid:
        """``[rows, lines, 1]``."""

        def of_lines(x: jax.Array) -> jax.Array:
            return jnp.repeat(x, self.lines_per_block, axis=1)[..., None]

        return jax.tree.map(of_lines, self.grid(scales))

    def payload_bytes(self, length: int) -> int:
        return length * self.width // 8 + self.scale_bytes * (length // self.block)


class PartsOfLargest(BlockCodes):
    """Codes of ``x / a``, ``a`` the absolute maximum of the block, which is sent as it is."""

    top: ClassVar[float] = 1
    """What :meth:`round` takes the largest for."""

    @abc.abstractmethod
    def round(self, x: jax.Array, noise: jax.Array | None) -> jax.Array:
        """The codes of numbers between ``-top`` and ``top``, which they may pass by a rounding."""

    @abc.abstractmethod
    def part(self, codes: jax.Array) -> jax.Array:
        """What ``uint8`` codes stand for, between -1 and 1."""

    def measure(self, blocks: jax.Array) -> dict[str, jax.Array]:
        return {"largest": largest(blocks)}

    def grid(self, scales: dict[str, jax.Array]) -> tuple[Lift, jax.Array]:
        by = lift_for(scales["largest"])
        return by, lift_one(scales["largest"], by)

    def to_codes(self, x: jax.Array, grid: Grid, noise: jax.Array | None) -> jax.Array:
        by, top = grid
        return self.round(lift(x, by) * over(self.top, top), noise)

    def from_codes(self, codes: jax.Array, grid: Grid) -> jax.Array:
        by, top = grid
        # 0 × NaN and 0 × ∞ are NaN: what was not finite stays so.
        return lower(self.part(codes) * top, by)
