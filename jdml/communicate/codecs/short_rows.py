"""Block codes for rows that are not whole blocks: the last block of each run is short.

Filled up to whole blocks, a small model says more than it holds: 28,768 elements among eight
workers are rows of 3,596, with blocks of 512 and two codes to a byte 4,096, a seventh more. Here
such a row is cut into runs of equal length, each run is filled up with zeros where it is encoded,
and the codes of the zeros are cut off before anything is sent.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp

from jdml.communicate.codecs.block_codes import BlockCodes


class ShortRows(BlockCodes):
    """Block codes whose scale does not mind zeros in a block, as a maximum does not.

    Cutting and filling copies a row once more, so long rows are filled up to whole blocks.
    """

    most_fill: ClassVar[float] = 1 / 512
    """What a long row may be filled up by, as a part of its length."""

    @property
    def _num_runs(self) -> int:
        return 8 // self.width

    def whole(self, length: int) -> int:
        length += -length % self._num_runs
        fill = -length % self.granularity
        return length + fill if fill <= self.most_fill * length else length

    def payload_bytes(self, length: int) -> int:
        run = length // self._num_runs
        num_blocks = self._num_runs * -(-run // self.block)
        return run + self.scale_bytes * num_blocks

    def encode_rows(self, rows: jax.Array, key: jax.Array | None = None) -> dict[str, jax.Array]:
        num_rows, length = rows.shape
        if length % self.granularity == 0:
            return super().encode_rows(rows, key)
        runs = rows.reshape(num_rows, self._num_runs, -1)
        run = runs.shape[-1]
        zeros = jnp.zeros((*runs.shape[:2], -run % self.block), rows.dtype)
        filled = jnp.concatenate([runs, zeros], axis=2).reshape(num_rows, -1)
        payload = super().encode_rows(filled, key)
        return payload | {"codes": payload["codes"].reshape(num_rows, -1)[:, :run]}

    def decode_rows(self, payload: dict[str, jax.Array], length: int) -> jax.Array:
        if length % self.granularity == 0:
            return super().decode_rows(payload, length)
        payload, filled = self._filled_up(payload, length)
        return self._cut_to(super().decode_rows(payload, filled), length)

    def _sum(self, payload: dict[str, jax.Array], length: int) -> jax.Array:
        if length % self.granularity == 0:
            return super()._sum(payload, length)
        payload, filled = self._filled_up(payload, length)
        return self._cut_to(super()._sum(payload, filled)[None], length)[0]

    def _filled_up(
        self, payload: dict[str, jax.Array], length: int
    ) -> tuple[dict[str, jax.Array], int]:
        """The payload of whole blocks, and their elements; code 0 stands for what was cut off."""
        codes = payload["codes"]
        num_rows, run = codes.shape
        zeros = jnp.zeros((num_rows, -run % self.block), codes.dtype)
        blocks = jnp.concatenate([codes, zeros], axis=1).reshape(num_rows, -1, self.block)
        return payload | {"codes": blocks}, length + self._num_runs * zeros.shape[1]

    def _cut_to(self, rows: jax.Array, length: int) -> jax.Array:
        runs = rows.reshape(rows.shape[0], self._num_runs, -1)
        return runs[:, :, : length // self._num_runs].reshape(rows.shape[0], length)
