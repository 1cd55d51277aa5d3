"""Block-wise 8-bit integers: one f32 scale per block of consecutive elements."""

import dataclasses

import jax
import jax.numpy as jnp

from jdml.communicate.codecs.base import Codec

_LEVELS = 127  # symmetric: -128 is not used, so that decode(encode(-x)) = -decode(encode(x))


@dataclasses.dataclass(frozen=True)
class Int8(Codec):
    """See :func:`int8`."""

    block: int = 256

    def __post_init__(self) -> None:
        if not isinstance(self.block, int) or self.block < 1:
            raise ValueError(
                f"int8(block={self.block!r}): expected a positive int, the number of consecutive "
                "elements that share one scale; 256 is the default."
            )

    @property
    def granularity(self) -> int:
        return self.block

    def encode_rows(self, rows: jax.Array, key: jax.Array | None = None) -> dict[str, jax.Array]:
        del key  # rounds to nearest
        num_rows, length = rows.shape
        blocks = rows.astype(jnp.float32).reshape(num_rows, length // self.block, self.block)
        # A NaN or infinity in a block makes its scale NaN or infinite, and so the decoded block.
        scale = jnp.max(jnp.abs(blocks), axis=-1) / _LEVELS
        # Below the smallest normal number the quotient is not representable: such a block is sent
        # as zeros, and error feedback keeps what it held.
        usable = scale >= jnp.finfo(jnp.float32).tiny
        inverse = jnp.where(usable, 1 / jnp.where(usable, scale, 1), 0)
        quotient = jnp.where(jnp.isfinite(scale)[..., None], blocks * inverse[..., None], 0)
        values = jnp.round(quotient).astype(jnp.int8)
        return {"values": values.reshape(num_rows, length), "scales": scale}

    def decode_rows(self, payload: dict[str, jax.Array], length: int) -> jax.Array:
        values, scales = payload["values"], payload["scales"]
        num_rows = values.shape[0]
        blocks = values.reshape(num_rows, length // self.block, self.block).astype(jnp.float32)
        # 0 × NaN and 0 × ∞ are NaN: what was not finite stays visible.
        decoded = blocks * scales[..., None]
        # 127 × fl(max/127) may round past the largest finite number.
        largest = jnp.finfo(jnp.float32).max
        decoded = jnp.where(
            jnp.isfinite(scales)[..., None], jnp.clip(decoded, -largest, largest), decoded
        )
        return decoded.reshape(num_rows, length)

    def payload_bytes(self, length: int) -> int:
        return length + 4 * (length // self.block)


def int8(block: int = 256) -> Int8:
    """Block-wise int8 with one f32 absolute-maximum scale per block, rounded to nearest.

    ``q_i = round(127 x_i / max_block |x|)``, so ``|decode(q)_i - x_i| <= max_block |x| / 254``.

    Args:
      block: Number of consecutive elements that share a scale.

    Bytes on the wire: ``1 + 4 / block`` per element (0.254 of f32 at ``block=256``).

    Reference: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", ICLR 2022
    (block-wise absolute-maximum scaling; here with linear levels).
    """
    return Int8(block)
