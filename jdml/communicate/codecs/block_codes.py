"""What codecs share that send a few numbers for each block and a short code for each element."""

import abc
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jdml.communicate.codecs import draws
from jdml.communicate.codecs.base import Codec, sum_rows
from jdml.communicate.codecs.packing import cut, join_planes, split_planes

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

    @property
    @abc.abstractmethod
    def width(self) -> int:
        """Bits of a code: 2, 4 or 8."""

    @property
    def num_scales(self) -> int:
        """How many f32 numbers a block sends."""
        return 1

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
    def granularity(self) -> int:
        return self.block * (8 // self.width)

    def encode_rows(self, rows: jax.Array, key: jax.Array | None = None) -> dict[str, jax.Array]:
        blocks = rows.astype(jnp.float32).reshape(rows.shape[0], -1, self.block)
        scales = self.measure(blocks)
        grid = jax.tree.map(lambda x: x[..., None], self.grid(scales))
        runs = cut((blocks, grid), 8 // self.width)
        noise: Sequence[jax.Array | None] = [None] * len(runs)
        if self.needs_key:
            assert key is not None
            noise = draws.uniform(key, blocks.shape, len(runs))
        codes = [self.to_codes(x, g, u) for (x, g), u in zip(runs, noise, strict=True)]
        return {"codes": join_planes(codes, self.width), **scales}

    def decode_rows(self, payload: dict[str, jax.Array], length: int) -> jax.Array:
        return jnp.concatenate(self._decode_runs(payload), axis=1).reshape(-1, length)

    def decode_sum(self, payload: dict[str, jax.Array], length: int) -> jax.Array:
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
        grid = jax.tree.map(lambda x: x[..., None], self.grid(scales))
        codes = split_planes(payload["codes"], self.width)
        return [self.from_codes(c, g) for c, g in zip(codes, cut(grid, len(codes)), strict=True)]

    def payload_bytes(self, length: int) -> int:
        return length * self.width // 8 + 4 * self.num_scales * (length // self.block)
